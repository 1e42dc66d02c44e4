// Chooses the kernels for the processor that runs, once.
#include <cstring>

#include "kernels/common/layer.h"

namespace moecalc::kernels {

#define MOECALC_DECLARE(isa)             \
  namespace isa {                        \
  const Kernels<float>& table_float();   \
  const Kernels<double>& table_double(); \
  }
MOECALC_DECLARE(generic)
#if defined(__x86_64__)
MOECALC_DECLARE(avx2)
MOECALC_DECLARE(avx512)
#endif

namespace {

int best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

int level(const char* wanted) {
  static const int available = best();
  if (wanted == nullptr || *wanted == '\0') return available;
  const int asked = std::strcmp(wanted, "avx512") == 0 ? 2 : std::strcmp(wanted, "avx2") == 0 ? 1 : 0;
  return asked < available ? asked : available;
}

}  // namespace

template <>
const Kernels<float>& select_kernels<float>(const char* wanted) {
#if defined(__x86_64__)
  switch (level(wanted)) {
    case 2:
      return avx512::table_float();
    case 1:
      return avx2::table_float();
    default:
      break;
  }
#else
  (void)wanted;
#endif
  return generic::table_float();
}

template <>
const Kernels<double>& select_kernels<double>(const char* wanted) {
#if defined(__x86_64__)
  switch (level(wanted)) {
    case 2:
      return avx512::table_double();
    case 1:
      return avx2::table_double();
    default:
      break;
  }
#else
  (void)wanted;
#endif
  return generic::table_double();
}

}  // namespace moecalc::kernels
