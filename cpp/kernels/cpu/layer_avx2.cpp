#define MOECALC_ISA avx2
#define MOECALC_ISA_NAME "avx2"
#define MOECALC_VECTOR_BYTES 32
#define MOECALC_REGISTERS 16
#include "kernels/cpu/table.h"
