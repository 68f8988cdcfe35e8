// What a kernel compiled for the CPU asks of the emulator.
// Knows threads, SIMD groups and threadgroups. Knows no Metal names; those are in msl.h.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {
struct emu_uint3 {
  uint32_t x, y, z;
};

// The attributes that Metal hands to a kernel, of the thread that runs now.
struct emu_thread_info {
  emu_uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  emu_uint3 threads_per_threadgroup, dispatch_threads_per_threadgroup, threads_per_grid, threadgroups_per_grid;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup, simdgroups_per_threadgroup;
};
extern __thread emu_thread_info* emu_me;

// One value a thread, seen by the whole SIMD group. met: bit i is set if thread i took part.
struct emu_exchange {
  uint32_t met;
  struct alignas(16) {
    unsigned char bytes[32];
  } of[32];
};

emu_exchange* emu_simd_offer();                                      // write into of[my index] of this, then
const emu_exchange* emu_simd_meet(const char* operation, int line);  // wait for all threads of the SIMD group
void emu_simdgroup_barrier(int line);
void emu_threadgroup_barrier(int line);
// Memory of a threadgroup variable: the same for all threads of the group, poisoned at first.
void* emu_threadgroup_memory(int site, size_t bytes, const char* name);
void emu_fail(const char* format, ...);

// Runs all threads of threadgroup number `first` and those after it; order 0: ascending, 1: descending, 2: shuffled.
// -> 0, or not, and `error` says why.
typedef void (*emu_kernel_function)(void** buffers);
int emu_dispatch(emu_kernel_function kernel, void** buffers, const uint32_t grid[3], const uint32_t threadgroup[3],
                 uint64_t first, int order, char* error, size_t error_size);
}
