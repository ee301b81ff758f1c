// Functions that are compiled for an instruction set must not stay behind out of line: the linker
// keeps one copy of an inline function, and would hand it to code that runs without the set.
#pragma once

#define QLORA_INLINE [[gnu::always_inline]] inline

/// After the parameters of a lambda.
#define QLORA_INLINE_LAMBDA __attribute__((always_inline))
