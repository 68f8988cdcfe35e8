// Runs one kernel with buffers from files, for the builds that a sanitizer watches. Every buffer is a malloc of its
// own. Arguments: folder, number of buffers, grid (3), threadgroup (3), order. Reads N.bin; ends with 3 and a line on
// stderr if the emulator objects.
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <vector>
#include "runtime.h"

extern "C" void emu_kernel(void** buffers);

int main(int, char** arguments) {
  std::vector<void*> buffers(atoi(arguments[2]));
  for (size_t i = 0; i < buffers.size(); i++) {
    FILE* file = fopen((std::string(arguments[1]) + "/" + std::to_string(i) + ".bin").c_str(), "rb");
    fseek(file, 0, SEEK_END);
    size_t bytes = ftell(file);
    rewind(file);
    buffers[i] = malloc(bytes);
    if (fread(buffers[i], 1, bytes, file) != bytes) return 9;
    fclose(file);
  }
  uint32_t grid[3], threadgroup[3];
  for (int i = 0; i < 3; i++) {
    grid[i] = atoi(arguments[3 + i]);
    threadgroup[i] = atoi(arguments[6 + i]);
  }
  char error[2048] = "";
  if (emu_dispatch(emu_kernel, buffers.data(), grid, threadgroup, 0, atoi(arguments[9]), error, sizeof error)) {
    fprintf(stderr, "emulator: %s\n", error);
    return 3;
  }
  return 0;
}
