// Compiles a function for several instruction sets. The loader picks the clone that suits the processor. Results are
// bitwise equal, because the compiler contracts nothing (-ffp-contract=off) and the source fixes the order of every
// sum.
#pragma once

#include <cstddef>  // defines the macros of the C library

// This needs GNU indirect functions. Without them (clang, macOS, musl, aarch64), or if a build defines the macro as
// empty, there is one version, for the target of the build.
#ifndef V05_MULTIVERSION
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11 && defined(__x86_64__) && defined(__GLIBC__)
#define V05_MULTIVERSIONED
#define V05_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define V05_MULTIVERSION
#endif
#endif
