#define MOECALC_ISA avx512
#define MOECALC_ISA_NAME "avx512"
#define MOECALC_VECTOR_BYTES 64
#define MOECALC_REGISTERS 32
#include "kernels/cpu/table.h"
