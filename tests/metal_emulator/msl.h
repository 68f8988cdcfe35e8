// The Metal Shading Language for clang++ on a CPU, as far as kernels here and MLX's own headers use it.
// Knows names and what they compute. Who else is in the SIMD group or threadgroup is the runtime's business.
//
// Included before the kernel's text. With EMU_ADDRESS_SPACES, `device`, `constant` and `threadgroup` are real address
// spaces, so that a pointer of one does not go where another is expected, as on a Mac; sanitizers do without them.
#pragma once
#include <float.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>

#include <limits>
#include <type_traits>

#include "runtime.h"

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
#define METAL_FUNC inline __attribute__((always_inline))

#define EMU_VECTOR_ELEMENTS(DO) \
  DO(float) DO(half) DO(bfloat) DO(int) DO(uint) DO(short) DO(ushort) DO(char) DO(uchar) DO(long) DO(ulong)
#define EMU_VECTORS(T)                                \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
EMU_VECTOR_ELEMENTS(EMU_VECTORS)

namespace metal {
template <class T, int N>
struct emu_vector {
  typedef T type __attribute__((ext_vector_type(N)));
};
template <class T>
struct emu_vector<T, 1> {
  typedef T type;
};
template <class T, int N>
using vec = typename emu_vector<T, N>::type;

// Traits
template <bool B, class T = void>
using enable_if = std::enable_if<B, T>;
template <bool B, class T = void>
using enable_if_t = typename std::enable_if<B, T>::type;
template <bool B, class A, class C>
using conditional_t = typename std::conditional<B, A, C>::type;
using std::is_convertible;
using std::is_integral;
using std::is_same;
template <class A, class B>
constexpr bool is_same_v = std::is_same<A, B>::value;
template <class A, class B>
constexpr bool is_convertible_v = std::is_convertible<A, B>::value;
template <class T>
constexpr bool is_integral_v = std::is_integral<T>::value;
template <class T>
constexpr bool is_signed_v = std::is_signed<T>::value;
template <class T>
constexpr bool is_unsigned_v = std::is_unsigned<T>::value;
template <class T>
struct is_floating_point : std::is_floating_point<T> {};
template <>
struct is_floating_point<half> : std::true_type {};
template <>
struct is_floating_point<bfloat> : std::true_type {};
template <class T>
constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  constexpr operator T() const { return v; }
};
template <bool b>
using bool_constant = integral_constant<bool, b>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <class T>
struct numeric_limits : std::numeric_limits<T> {};
#define EMU_LIMITS(T, MAX, MIN, EPSILON)                             \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr T max() { return (T)MAX; }                      \
    static constexpr T lowest() { return (T) - MAX; }                \
    static constexpr T min() { return (T)MIN; }                      \
    static constexpr T infinity() { return (T)__builtin_inff(); }    \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
    static constexpr T epsilon() { return (T)EPSILON; }              \
  };
EMU_LIMITS(half, 65504.0f, 6.103515625e-05f, 0.0009765625f)
EMU_LIMITS(bfloat, 3.3895313892515355e38f, 1.17549435e-38f, 0.0078125f)

// Casts and vectors: `float4(a, v.xy, b)` is rewritten to emu_make<float4>(a, v.xy, b).
template <class To, class From>
METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
template <class V>
struct emu_shape {
  static constexpr int count = 1;
  typedef V element;
};
#define EMU_SHAPE_OF(T, N)          \
  template <>                       \
  struct emu_shape<T##N> {          \
    static constexpr int count = N; \
    typedef T element;              \
  };
#define EMU_SHAPES(T) EMU_SHAPE_OF(T, 2) EMU_SHAPE_OF(T, 3) EMU_SHAPE_OF(T, 4)
EMU_VECTOR_ELEMENTS(EMU_SHAPES)
template <class V>
constexpr bool emu_is_vector = (emu_shape<V>::count > 1);
template <class S, bool is_vector>
struct emu_append {
  template <class E>
  static void to(E* out, int& filled, const S& s) {
    for (int i = 0; i < emu_shape<S>::count; i++) out[filled++] = (E)s[i];
  }
};
template <class S>
struct emu_append<S, false> {
  template <class E>
  static void to(E* out, int& filled, const S& s) {
    out[filled++] = (E)s;
  }
};
template <class V, class... A>
METAL_FUNC V emu_make(A... a) {
  typedef typename emu_shape<V>::element E;
  E values[4 * sizeof...(A) + 1];
  int filled = 0;
  int each[] = {0, (emu_append<A, emu_is_vector<A>>::to(values, filled, a), 0)...};
  (void)each;
  V v;
  for (int i = 0; i < emu_shape<V>::count; i++) v[i] = values[filled == 1 ? 0 : i];
  return v;
}

// Mathematics: computed in float; half and bfloat round the result; vectors go element by element.
#define EMU_MATH1(name, expression)                                                                  \
  METAL_FUNC float name(float x) { return expression; }                                              \
  METAL_FUNC half name(half h) {                                                                     \
    float x = (float)h;                                                                              \
    return (half)(expression);                                                                       \
  }                                                                                                  \
  METAL_FUNC bfloat name(bfloat h) {                                                                 \
    float x = (float)h;                                                                              \
    return (bfloat)(expression);                                                                     \
  }                                                                                                  \
  template <class V>                                                                                 \
  METAL_FUNC enable_if_t<emu_is_vector<V>, V> name(V v) {                                            \
    V r;                                                                                             \
    for (int i = 0; i < emu_shape<V>::count; i++) r[i] = name((typename emu_shape<V>::element)v[i]); \
    return r;                                                                                        \
  }
#define EMU_MATH                                                              \
  EMU_MATH1(exp, __builtin_expf(x))                                           \
  EMU_MATH1(exp2, __builtin_exp2f(x))                                         \
  EMU_MATH1(log, __builtin_logf(x))                                           \
  EMU_MATH1(log2, __builtin_log2f(x))                                         \
  EMU_MATH1(log10, __builtin_log10f(x))                                       \
  EMU_MATH1(sqrt, __builtin_sqrtf(x))                                         \
  EMU_MATH1(rsqrt, (1.0f / __builtin_sqrtf(x)))                               \
  EMU_MATH1(sin, __builtin_sinf(x))                                           \
  EMU_MATH1(cos, __builtin_cosf(x))                                           \
  EMU_MATH1(tan, __builtin_tanf(x))                                           \
  EMU_MATH1(tanh, __builtin_tanhf(x))                                         \
  EMU_MATH1(sinh, __builtin_sinhf(x))                                         \
  EMU_MATH1(cosh, __builtin_coshf(x))                                         \
  EMU_MATH1(asin, __builtin_asinf(x))                                         \
  EMU_MATH1(acos, __builtin_acosf(x))                                         \
  EMU_MATH1(atan, __builtin_atanf(x))                                         \
  EMU_MATH1(asinh, __builtin_asinhf(x))                                       \
  EMU_MATH1(acosh, __builtin_acoshf(x))                                       \
  EMU_MATH1(atanh, __builtin_atanhf(x))                                       \
  METAL_FUNC float pow(float a, float b) { return __builtin_powf(a, b); }     \
  METAL_FUNC float fmod(float a, float b) { return __builtin_fmodf(a, b); }   \
  METAL_FUNC float atan2(float a, float b) { return __builtin_atan2f(a, b); } \
  METAL_FUNC float divide(float a, float b) { return a / b; }
EMU_MATH
namespace precise {
EMU_MATH
}
namespace fast {
EMU_MATH
}
EMU_MATH1(floor, __builtin_floorf(x))
EMU_MATH1(ceil, __builtin_ceilf(x))
EMU_MATH1(round, __builtin_roundf(x))
EMU_MATH1(rint, __builtin_rintf(x))
EMU_MATH1(trunc, __builtin_truncf(x))
EMU_MATH1(fabs, __builtin_fabsf(x))
template <class T>
METAL_FUNC T abs(T x) {
  return x < T(0) ? T(-x) : x;
}
METAL_FUNC float abs(float x) { return __builtin_fabsf(x); }
template <class T>
METAL_FUNC T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
METAL_FUNC T max(T a, T b) {
  return a < b ? b : a;
}
METAL_FUNC float min(float a, float b) { return __builtin_fminf(a, b); }
METAL_FUNC float max(float a, float b) { return __builtin_fmaxf(a, b); }
METAL_FUNC float fmin(float a, float b) { return __builtin_fminf(a, b); }
METAL_FUNC float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
// Ambiguous on a Mac, so they do not compile here.
template <class A, class B>
enable_if_t<!is_same_v<A, B>, A> min(A, B) = delete;
template <class A, class B>
enable_if_t<!is_same_v<A, B>, A> max(A, B) = delete;
template <class T>
METAL_FUNC T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <class T>
METAL_FUNC T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class V>
METAL_FUNC typename emu_shape<V>::element dot(V a, V b) {
  typename emu_shape<V>::element s = a[0] * b[0];
  for (int i = 1; i < emu_shape<V>::count; i++) s += a[i] * b[i];
  return s;
}
template <class T>
METAL_FUNC bool isnan(T x) {
  return __builtin_isnan((float)x);
}
template <class T>
METAL_FUNC bool isinf(T x) {
  return __builtin_isinf((float)x);
}
template <class T>
METAL_FUNC T popcount(T x) {
  return (T)__builtin_popcountll((typename std::make_unsigned<T>::type)x);
}
METAL_FUNC uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
METAL_FUNC uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
METAL_FUNC float copysign(float a, float b) { return __builtin_copysignf(a, b); }
METAL_FUNC float ldexp(float a, int b) { return __builtin_ldexpf(a, b); }

// SIMD groups: all threads that are still running have to meet at the same line; a thread that is not there is not
// read.
#define EMU_UNWATCHED __attribute__((no_sanitize("thread", "address", "undefined")))
template <class T>
EMU_UNWATCHED __attribute__((noinline)) const emu_exchange* emu_meet(const T& v, const char* operation, int line) {
  static_assert(sizeof(T) <= 32, "a value too large to be exchanged");
  *(T*)emu_simd_offer()->of[emu_me->thread_index_in_simdgroup].bytes = v;
  return emu_simd_meet(operation, line);
}
METAL_FUNC int emu_index() { return emu_me->thread_index_in_simdgroup; }
template <class T>
EMU_UNWATCHED METAL_FUNC T emu_of(const emu_exchange* e, int thread, T own, const char* operation, int line) {
  if (thread >= 0 && thread < 32 && (e->met >> thread) & 1) return *(const T*)e->of[thread].bytes;
  emu_fail("%s (line %d) reads thread %d of the SIMD group, which is not there", operation, line, thread);
  __builtin_memset(&own, 0xFF, sizeof own);
  return own;
}
#define EMU_SHUFFLE(name, FROM, WHERE_OUTSIDE)                     \
  template <class T>                                               \
  METAL_FUNC T name(T v, ushort by, int line = __builtin_LINE()) { \
    const emu_exchange* e = emu_meet(v, #name, line);              \
    int from = FROM;                                               \
    return WHERE_OUTSIDE ? v : emu_of(e, from, v, #name, line);    \
  }
EMU_SHUFFLE(simd_shuffle, by, false)
EMU_SHUFFLE(simd_broadcast, by, false)
EMU_SHUFFLE(simd_shuffle_xor, emu_index() ^ by, false)
EMU_SHUFFLE(simd_shuffle_down, emu_index() + by, from > 31)
EMU_SHUFFLE(simd_shuffle_up, emu_index() - by, from < 0)
template <class T>
METAL_FUNC T simd_shuffle_and_fill_up(T v, T fill, ushort by, int line = __builtin_LINE()) {
  const emu_exchange* e = emu_meet(v, "simd_shuffle_and_fill_up", line);
  int from = emu_index() - by;
  return from < 0 ? fill : emu_of(e, from, v, "simd_shuffle_and_fill_up", line);
}
template <class T>
METAL_FUNC T simd_broadcast_first(T v, int line = __builtin_LINE()) {
  const emu_exchange* e = emu_meet(v, "simd_broadcast_first", line);
  return emu_of(e, __builtin_ctz(e->met), v, "simd_broadcast_first", line);
}
#define EMU_PREFIX_SUM(name, LAST)                                                               \
  template <class T>                                                                             \
  EMU_UNWATCHED METAL_FUNC T name(T v, int line = __builtin_LINE()) {                            \
    const emu_exchange* e = emu_meet(v, #name, line);                                            \
    T sum = T(0);                                                                                \
    for (int i = 0; i <= LAST; i++) sum += (e->met >> i) & 1 ? *(const T*)e->of[i].bytes : T(0); \
    return sum;                                                                                  \
  }
EMU_PREFIX_SUM(simd_prefix_inclusive_sum, emu_index())
EMU_PREFIX_SUM(simd_prefix_exclusive_sum, emu_index() - 1)
// Neighbours first, then pairs of them, ...: a fixed order, but which one Apple's hardware takes is not documented.
template <class T, class F>
EMU_UNWATCHED METAL_FUNC T emu_reduce(T v, T neutral, F f, const char* operation, int line) {
  const emu_exchange* e = emu_meet(v, operation, line);
  T a[32];
  for (int i = 0; i < 32; i++) a[i] = (e->met >> i) & 1 ? *(const T*)e->of[i].bytes : neutral;
  for (int step = 1; step < 32; step *= 2)
    for (int i = 0; i < 32; i += 2 * step) a[i] = f(a[i], a[i + step]);
  return a[0];
}
template <class T>
constexpr T emu_least() {
  return is_floating_point_v<T> ? T(-numeric_limits<T>::infinity()) : numeric_limits<T>::lowest();
}
template <class T>
constexpr T emu_most() {
  return is_floating_point_v<T> ? T(numeric_limits<T>::infinity()) : numeric_limits<T>::max();
}
#define EMU_REDUCTION(name, NEUTRAL, COMBINED)                \
  struct emu_##name {                                         \
    template <class T>                                        \
    T operator()(T a, T b) const {                            \
      return COMBINED;                                        \
    }                                                         \
  };                                                          \
  template <class T>                                          \
  METAL_FUNC T name(T v, int line = __builtin_LINE()) {       \
    return emu_reduce(v, NEUTRAL, emu_##name(), #name, line); \
  }
EMU_REDUCTION(simd_sum, T(0), a + b)
EMU_REDUCTION(simd_product, T(1), a* b)
EMU_REDUCTION(simd_max, emu_least<T>(), (a < b ? b : a))
EMU_REDUCTION(simd_min, emu_most<T>(), (b < a ? b : a))
EMU_REDUCTION(simd_or, T(0), a | b)
EMU_REDUCTION(simd_and, T(~T(0)), a& b)
EMU_REDUCTION(simd_xor, T(0), a ^ b)
METAL_FUNC bool simd_any(bool v, int line = __builtin_LINE()) { return simd_or((int)v, line); }
METAL_FUNC bool simd_all(bool v, int line = __builtin_LINE()) { return simd_and((int)v, line); }

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
METAL_FUNC void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) { emu_threadgroup_barrier(line); }
METAL_FUNC void simdgroup_barrier(mem_flags, int line = __builtin_LINE()) { emu_simdgroup_barrier(line); }
}  // namespace metal
using namespace metal;

#define thread
#ifdef EMU_ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif

// `threadgroup float a[8];` is rewritten to EMU_THREADGROUP(float, a, [8]).
#define EMU_THREADGROUP(T, name, dimensions) \
  typedef T emu_type_of_##name dimensions;   \
  threadgroup emu_type_of_##name& name =     \
      *(threadgroup emu_type_of_##name*)emu_threadgroup_memory(__COUNTER__, sizeof(emu_type_of_##name), #name);
// Kernel arguments from buffers.
struct emu_pointer {
  void* to;
  template <class T>
  operator T*() const {
    return (T*)to;
  }
};
struct emu_reference {
  void* to;
  template <class T>
  operator T&() const {
    return *(T*)to;
  }
};
static inline uint3 emu_vector_of(emu_uint3 v) { return uint3{v.x, v.y, v.z}; }
