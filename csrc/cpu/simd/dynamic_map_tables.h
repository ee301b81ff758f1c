// The tables of format/dynamic_map_table.h as the vector sets share them: defined once, in a source
// that any processor can run; inline, each set would have its own.
#pragma once

#include "format/dynamic_map_table.h"

namespace qlora::simd {

extern const SignedDynamicMapTable signed_dynamic_map_table;
extern const UnsignedDynamicMapTable unsigned_dynamic_map_table;

}  // namespace qlora::simd
