#define MOECALC_ISA generic
#define MOECALC_ISA_NAME "generic"
#define MOECALC_VECTOR_BYTES 16
#define MOECALC_REGISTERS 16
#include "kernels/cpu/table.h"
