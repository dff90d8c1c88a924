// Whether this build has the path that multiplies in matrix registers, AMX.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && !defined(PETL_PORTABLE_ONLY) && (defined(__clang__) || __GNUC__ >= 11)
#define PETL_MATRIX_REGISTERS
#endif
