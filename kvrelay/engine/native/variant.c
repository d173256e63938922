// All kernels of one variant. build.py compiles this file once for each, with its instructions,
// its VARIANT and its VARIANT_HEADER.
#include "kernels.h"

#include "matrices.c"
#include "matrices_bf16.c"
#include "matrices_int8.c"

#include "attention.h"

#include "attention_few_rows.c"
#include "attention_many_rows.c"
#include "attention_int8.c"
#include "attention_bf16.c"

#include "attention.c"

#include "decoder.c"
#include "experts.c"
#include "kv_copy.c"
#include "linear.c"
