// Which paths this build has beside those that every compiler for x86 knows.
#pragma once

#ifdef __clang__
#define PETL_COMPILER_IS(clang, gcc) (__clang_major__ >= (clang))
#else
#define PETL_COMPILER_IS(clang, gcc) (__GNUC__ >= (gcc))
#endif

#if defined(__linux__) && !defined(PETL_PORTABLE_ONLY)
#if defined(__x86_64__) && PETL_COMPILER_IS(11, 11)
#define PETL_MATRIX_REGISTERS  // AMX
#endif
#if defined(__aarch64__) && PETL_COMPILER_IS(16, 10)
#define PETL_ARM_PATHS
#endif
#endif
