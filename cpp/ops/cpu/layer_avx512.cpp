#define MOECALC_ISA avx512
#define MOECALC_ISA_NAME "avx512"
#define MOECALC_VECTOR_BYTES 64
#define MOECALC_REGISTERS 32
#include "layer_kernels.h"
