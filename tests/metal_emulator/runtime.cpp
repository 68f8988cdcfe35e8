// Runs a kernel with one fiber a thread, one threadgroup after the other, in a chosen order.
//
// A fiber runs until it ends or waits: at a SIMD operation for its SIMD group, at a barrier for its threadgroup. If
// those that should meet do not, that is an error. Threadgroup memory is poisoned and lies between fences.
// Built plain, with EMU_ASAN or with EMU_TSAN; the sanitizers are told of every change of fiber.
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#ifdef EMU_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMU_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

// Saves the registers a call must keep on this stack, writes its pointer to *from, and goes on with the stack `to`.
extern "C" void emu_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  sub sp,sp,#160
  stp x19,x20,[sp,#0]; stp x21,x22,[sp,#16]; stp x23,x24,[sp,#32]; stp x25,x26,[sp,#48]
  stp x27,x28,[sp,#64]; stp x29,x30,[sp,#80]; stp d8,d9,[sp,#96]; stp d10,d11,[sp,#112]
  stp d12,d13,[sp,#128]; stp d14,d15,[sp,#144]
  mov x9,sp
  str x9,[x0]
  mov sp,x1
  ldp x19,x20,[sp,#0]; ldp x21,x22,[sp,#16]; ldp x23,x24,[sp,#32]; ldp x25,x26,[sp,#48]
  ldp x27,x28,[sp,#64]; ldp x29,x30,[sp,#80]; ldp d8,d9,[sp,#96]; ldp d10,d11,[sp,#112]
  ldp d12,d13,[sp,#128]; ldp d14,d15,[sp,#144]
  add sp,sp,#160
  ret
.size emu_switch,.-emu_switch
)");
#endif

extern "C" __thread emu_thread_info* emu_me = nullptr;

namespace {
constexpr size_t STACK = 256 * 1024, ARENA = 1 << 20, FENCE = 1024;
constexpr size_t THREADGROUP_MEMORY = 32768;  // what a Metal threadgroup has
constexpr int MOST_THREADS = 1024, SIMD = 32;

enum class State { READY, AT_SIMD, AT_BARRIER, DONE };

struct Thread {
  emu_thread_info info;
  void* pointer;  // of its stack
  char* stack;
  State state;
  const char* waits_at;
  int line;
  uint32_t barriers;  // that it has passed
#ifdef EMU_TSAN
  void* fiber;
#endif
#ifdef EMU_ASAN
  void* fake_stack;
#endif
};

struct SimdGroup {
  emu_exchange exchanges[2];  // of this meeting and the one before, which some threads may still be reading
  uint32_t meetings;
  char synchronized[2];
};

struct Variable {
  int site;
  char* memory;
  size_t bytes;
  const char* name;
};

struct Run {
  std::vector<Thread> threads;
  std::vector<SimdGroup> simdgroups;
  std::vector<Variable> variables;
  emu_kernel_function kernel;
  void** buffers;
  int order;
  uint32_t random = 2654435769u;
  Thread* now = nullptr;
  void* pointer = nullptr;  // of the scheduler's stack
  char* arena = nullptr;
  size_t arena_used = 0, threadgroup_used = 0;
  bool failed = false;
  char error[1024] = "";
  char synchronized[2], started, ended;
#ifdef EMU_TSAN
  void* fiber;
#endif
#ifdef EMU_ASAN
  void* fake_stack;
  const void* stack_bottom;
  size_t stack_size;
#endif
};
Run* run;

void to_scheduler(Thread* thread) {
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(run->fiber, 1);
#endif
#ifdef EMU_ASAN
  void** fake = thread->state == State::DONE ? nullptr : &thread->fake_stack;
  __sanitizer_start_switch_fiber(fake, run->stack_bottom, run->stack_size);
#endif
  emu_switch(&thread->pointer, run->pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(thread->fake_stack, &run->stack_bottom, &run->stack_size);
#endif
}

void to_thread(Thread* thread) {
  run->now = thread;
  emu_me = &thread->info;
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(thread->fiber, 1);
#endif
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(&run->fake_stack, thread->stack, STACK);
#endif
  emu_switch(&run->pointer, thread->pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(run->fake_stack, nullptr, nullptr);
#endif
}

void thread_main() {
  Thread* thread = run->now;
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &run->stack_bottom, &run->stack_size);
#endif
#ifdef EMU_TSAN
  __tsan_acquire(&run->started);
#endif
  run->kernel(run->buffers);
#ifdef EMU_TSAN
  __tsan_release(&run->ended);
#endif
  thread->state = State::DONE;
  to_scheduler(thread);
  abort();
}

char* pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  return static_cast<char*>(memory);
}

void put_on_stack(Thread& thread) {
  if (!thread.stack) thread.stack = pages(STACK);
  uintptr_t top = (reinterpret_cast<uintptr_t>(thread.stack) + STACK) & ~uintptr_t(63);
#if defined(__x86_64__)
  void** frame = reinterpret_cast<void**>(top);
  *--frame = nullptr;
  *--frame = reinterpret_cast<void*>(thread_main);
  for (int i = 0; i < 6; i++) *--frame = nullptr;
  thread.pointer = frame;
#else
  char* frame = reinterpret_cast<char*>(top) - 160;
  memset(frame, 0, 160);
  *reinterpret_cast<void**>(frame + 88) = reinterpret_cast<void*>(thread_main);
  thread.pointer = frame;
#endif
}

uint32_t random_number() {
  uint32_t& x = run->random;
  x ^= x << 13;
  x ^= x >> 17;
  x ^= x << 5;
  return x;
}

void in_order(std::vector<int>& numbers) {
  if (run->order == 1) std::reverse(numbers.begin(), numbers.end());
  if (run->order == 2)
    for (size_t i = numbers.size(); i > 1; i--) std::swap(numbers[i - 1], numbers[random_number() % i]);
}

// Runs one SIMD group until all its threads have ended or wait at a threadgroup barrier.
void run_simdgroup(int group, int count) {
  int first = group * SIMD, last = std::min(count, first + SIMD);
  std::vector<int> turns;
  for (int i = first; i < last; i++) turns.push_back(i);
  in_order(turns);
  for (;;) {
    for (int i : turns) {
      if (run->threads[i].state == State::READY) to_thread(&run->threads[i]);
      if (run->failed) return;
    }
    uint32_t met = 0;
    const Thread *here = nullptr, *elsewhere = nullptr, *at_barrier = nullptr;
    for (int i = first; i < last; i++) {
      Thread& thread = run->threads[i];
      if (thread.state == State::AT_BARRIER) at_barrier = &thread;
      if (thread.state != State::AT_SIMD) continue;
      met |= 1u << (i - first);
      if (!here) here = &thread;
      if (thread.line != here->line || strcmp(thread.waits_at, here->waits_at)) elsewhere = &thread;
    }
    if (!here) return;
    if (at_barrier)
      return emu_fail(
          "divergence: in SIMD group %d some threads are at %s (line %d) and others at threadgroup_barrier (line %d)",
          group, here->waits_at, here->line, at_barrier->line);
    if (elsewhere)
      return emu_fail("divergence: in SIMD group %d thread %u is at %s (line %d) but thread %u at %s (line %d)", group,
                      here->info.thread_index_in_simdgroup, here->waits_at, here->line,
                      elsewhere->info.thread_index_in_simdgroup, elsewhere->waits_at, elsewhere->line);
    SimdGroup& mine = run->simdgroups[group];
    mine.exchanges[mine.meetings & 1].met = met;
    mine.meetings++;
    for (int i = first; i < last; i++)
      if (run->threads[i].state == State::AT_SIMD) run->threads[i].state = State::READY;
  }
}

void check_fences() {
#if !defined(EMU_ASAN) && !defined(EMU_TSAN)
  for (const Variable& each : run->variables)
    for (size_t i = 0; i < FENCE; i++)
      if ((unsigned char)each.memory[(long)i - (long)FENCE] != 0xCD ||
          (unsigned char)each.memory[each.bytes + i] != 0xCD)
        return emu_fail("write outside of the threadgroup array '%s'", each.name);
#endif
}

// Places the threads of one threadgroup at their start; -> how many there are (fewer at the edge of the grid).
int place(const uint32_t grid[3], const uint32_t size[3], emu_uint3 position, emu_uint3 groups) {
  uint32_t nx = std::min(size[0], grid[0] - position.x * size[0]);
  uint32_t ny = std::min(size[1], grid[1] - position.y * size[1]);
  uint32_t nz = std::min(size[2], grid[2] - position.z * size[2]);
  int count = nx * ny * nz, simdgroups = (count + SIMD - 1) / SIMD;
  for (int i = run->threads.size(); i < count; i++) {
    run->threads.push_back(Thread());
    memset(static_cast<void*>(&run->threads[i]), 0, sizeof(Thread));
#ifdef EMU_TSAN
    run->threads[i].fiber = __tsan_create_fiber(0);
#endif
  }
  run->simdgroups.resize(simdgroups);
  for (SimdGroup& each : run->simdgroups) each.meetings = 0;
  for (int i = 0; i < count; i++) {
    Thread& thread = run->threads[i];
    thread.state = State::READY;
    thread.barriers = 0;
    put_on_stack(thread);
    uint32_t x = i % nx, y = i / nx % ny, z = i / nx / ny;
    emu_thread_info& info = thread.info;
    info.thread_position_in_threadgroup = {x, y, z};
    info.threadgroup_position_in_grid = position;
    info.thread_position_in_grid = {position.x * size[0] + x, position.y * size[1] + y, position.z * size[2] + z};
    info.threads_per_threadgroup = {nx, ny, nz};
    info.dispatch_threads_per_threadgroup = {size[0], size[1], size[2]};
    info.threads_per_grid = {grid[0], grid[1], grid[2]};
    info.threadgroups_per_grid = groups;
    info.thread_index_in_threadgroup = i;
    info.thread_index_in_simdgroup = i % SIMD;
    info.simdgroup_index_in_threadgroup = i / SIMD;
    info.simdgroups_per_threadgroup = simdgroups;
  }
  return count;
}

void run_threadgroup(int count) {
  run->variables.clear();
  run->arena_used = run->threadgroup_used = 0;
#ifdef EMU_TSAN
  run->arena = pages(ARENA);  // fresh for each threadgroup: what another did with it is no race
  memset(run->arena, 0xFF, 2 * THREADGROUP_MEMORY);
  __tsan_release(&run->started);
#else
  if (!run->arena) run->arena = pages(ARENA);
#endif
  std::vector<int> turns;
  for (int i = 0; i * SIMD < count; i++) turns.push_back(i);
  in_order(turns);
  for (;;) {
    if (run->order == 2) in_order(turns);
    for (int group : turns) {
      run_simdgroup(group, count);
      if (run->failed) return;
    }
    int done = 0;
    const Thread *here = nullptr, *elsewhere = nullptr, *ended = nullptr;
    for (int i = 0; i < count; i++) {
      Thread& thread = run->threads[i];
      if (thread.state == State::DONE) {
        done++;
        ended = &thread;
        continue;
      }
      if (!here) here = &thread;
      if (thread.line != here->line) elsewhere = &thread;
    }
    if (!here) return check_fences();
    if (ended)
      return emu_fail(
          "threadgroup_barrier (line %d) is not reached by all threads: %d of %d have ended (thread %u for one)",
          here->line, done, count, ended->info.thread_index_in_threadgroup);
    if (elsewhere)
      return emu_fail("threads wait at different threadgroup_barriers: line %d and line %d", here->line,
                      elsewhere->line);
    for (int i = 0; i < count; i++) run->threads[i].state = State::READY;
  }
}

SimdGroup& my_simdgroup() { return run->simdgroups[run->now->info.simdgroup_index_in_threadgroup]; }

void wait_at(State state, const char* operation, int line) {
  run->now->state = state;
  run->now->waits_at = operation;
  run->now->line = line;
  to_scheduler(run->now);
}
}  // namespace

extern "C" {
emu_exchange* emu_simd_offer() {
  SimdGroup& mine = my_simdgroup();
  return &mine.exchanges[mine.meetings & 1];
}

const emu_exchange* emu_simd_meet(const char* operation, int line) {
  emu_exchange* exchange = emu_simd_offer();
  wait_at(State::AT_SIMD, operation, line);
  return exchange;
}

void emu_simdgroup_barrier(int line) {
#ifdef EMU_TSAN
  SimdGroup& mine = my_simdgroup();
  char* meeting = &mine.synchronized[mine.meetings & 1];
  __tsan_release(meeting);
#endif
  wait_at(State::AT_SIMD, "simdgroup_barrier", line);
#ifdef EMU_TSAN
  __tsan_acquire(meeting);
#endif
}

void emu_threadgroup_barrier(int line) {
#ifdef EMU_TSAN
  char* meeting = &run->synchronized[run->now->barriers++ & 1];
  __tsan_release(meeting);
#endif
  wait_at(State::AT_BARRIER, "threadgroup_barrier", line);
#ifdef EMU_TSAN
  __tsan_acquire(meeting);
#endif
}

void* emu_threadgroup_memory(int site, size_t bytes, const char* name) {
  for (const Variable& each : run->variables)
    if (each.site == site) return each.memory;
  run->threadgroup_used += (bytes + 15) & ~size_t(15);
  if (run->threadgroup_used > THREADGROUP_MEMORY) {
    emu_fail("threadgroup memory of %zu bytes is over the limit of %zu, at '%s'", run->threadgroup_used,
             THREADGROUP_MEMORY, name);
    to_scheduler(run->now);
  }
  char* memory = run->arena + run->arena_used + FENCE;
  run->arena_used += ((bytes + 63) & ~size_t(63)) + FENCE;
#ifdef EMU_ASAN
  memory = static_cast<char*>(malloc(bytes));  // never freed: it is known to the sanitizer from end to end
#elif !defined(EMU_TSAN)
  memset(memory - FENCE, 0xCD, FENCE);
  memset(memory + bytes, 0xCD, FENCE);
#endif
#ifndef EMU_TSAN
  memset(memory, 0xFF, bytes);
#endif
  run->variables.push_back({site, memory, bytes, name});
  return memory;
}

void emu_fail(const char* format, ...) {
  if (run->failed) return;
  run->failed = true;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(run->error, sizeof run->error, format, arguments);
  va_end(arguments);
}

int emu_dispatch(emu_kernel_function kernel, void** buffers, const uint32_t grid[3], const uint32_t threadgroup[3],
                 uint64_t first, int order, char* error, size_t error_size) {
  uint32_t size[3];
  for (int i = 0; i < 3; i++) size[i] = std::min(threadgroup[i], grid[i]);
  if ((uint64_t)size[0] * size[1] * size[2] > MOST_THREADS) {
    snprintf(error, error_size, "a threadgroup of more than %d threads", MOST_THREADS);
    return 2;
  }
  run = new Run();
  run->kernel = kernel;
  run->buffers = buffers;
  run->order = order;
  run->threads.reserve(MOST_THREADS);
#ifdef EMU_TSAN
  run->fiber = __tsan_get_current_fiber();
#endif
  emu_uint3 groups;
  groups.x = (grid[0] + size[0] - 1) / size[0];
  groups.y = (grid[1] + size[1] - 1) / size[1];
  groups.z = (grid[2] + size[2] - 1) / size[2];
  uint64_t total = (uint64_t)groups.x * groups.y * groups.z;
  for (uint64_t i = first; i < total && !run->failed; i++) {
    uint64_t number = order == 1 ? total - 1 - (i - first) : i;
    emu_uint3 position;
    position.x = number % groups.x;
    position.y = number / groups.x % groups.y;
    position.z = number / groups.x / groups.y;
    run_threadgroup(place(grid, size, position, groups));
    if (run->failed)
      snprintf(error, error_size, "threadgroup (%u,%u,%u): %s", position.x, position.y, position.z, run->error);
  }
  int result = run->failed;
#ifdef EMU_TSAN
  __tsan_acquire(&run->ended);
#else
  for (Thread& thread : run->threads) munmap(thread.stack, STACK);
  if (run->arena) munmap(run->arena, ARENA);
  delete run;
#endif
  return result;
}
}
