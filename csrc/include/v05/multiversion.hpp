// One source, several instruction sets: the loader picks the clone the processor can run. Results agree bitwise because
// nothing is contracted (-ffp-contract=off) and every sum's order is written in the source.
#pragma once

#include <cstddef>  // says which C library this is

// Needs GNU indirect functions; elsewhere (clang, macOS, musl, aarch64), and where a build defines it empty, there is
// one version, for the target built for.
#ifndef V05_MULTIVERSION
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11 && defined(__x86_64__) && defined(__GLIBC__)
#define V05_MULTIVERSIONED
#define V05_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define V05_MULTIVERSION
#endif
#endif
