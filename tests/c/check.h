// Checks for the C and C++ hosts of this folder: each one that fails prints its expression, file, line and values, and ends the program
// with 1. A program that would rather list all of its failures defines CHECK_CONTINUE and ends with check_end.
#ifndef CHECK_H
#define CHECK_H

#include <lycore.h>

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_count = 0;
static int check_failures = 0;

static inline void check_failed(void) {
    check_failures++;
    fflush(stdout);
#ifndef CHECK_CONTINUE
    exit(1);
#endif
}

// The last line of every program, and its exit status.
static inline int check_end(const char *program) {
    if (check_failures > 0) {
        printf("%s: %d of %d checks FAILED\n", program, check_failures, check_count);
        return 1;
    }
    printf("%s: %d checks passed\n", program, check_count);
    return 0;
}

static inline void check_true(int held, const char *text, const char *file, int line) {
    check_count++;
    if (!held) {
        printf("%s:%d: not true: %s\n", file, line, text);
        check_failed();
    }
}

static inline void check_equal(int64_t got, int64_t want, const char *text, const char *file, int line) {
    check_count++;
    if (got != want) {
        printf("%s:%d: %s: got %" PRId64 ", want %" PRId64 "\n", file, line, text, got, want);
        check_failed();
    }
}

static inline void check_text(const char *got, const char *want, const char *text, const char *file, int line) {
    check_count++;
    if (got == NULL || strcmp(got, want) != 0) {
        printf("%s:%d: %s: got \"%s\", want \"%s\"\n", file, line, text, got == NULL ? "(NULL)" : got, want);
        check_failed();
    }
}

static inline void check_contains(const char *got, const char *part, const char *text, const char *file, int line) {
    check_count++;
    if (got == NULL || strstr(got, part) == NULL) {
        printf("%s:%d: %s: no \"%s\" in \"%s\"\n", file, line, text, part, got == NULL ? "(NULL)" : got);
        check_failed();
    }
}

// `!(… <= …)`, so that a NaN fails.
static inline void check_near(double got, double want, double tolerance, const char *text, const char *file, int line) {
    check_count++;
    if (!(fabs(got - want) <= tolerance)) {
        printf("%s:%d: %s: got %.9g, want %.9g, off by %.3g, allowed %.3g\n", file, line, text, got, want, fabs(got - want), tolerance);
        check_failed();
    }
}

static inline void check_bytes(const void *got, const void *want, size_t size, const char *text, const char *file, int line) {
    const unsigned char *a = (const unsigned char *)got, *b = (const unsigned char *)want;
    size_t at = 0;
    check_count++;
    while (at < size && a[at] == b[at]) at++;
    if (at < size) {
        printf("%s:%d: %s: byte %zu of %zu is 0x%02x, want 0x%02x\n", file, line, text, at, size, (unsigned)a[at], (unsigned)b[at]);
        check_failed();
    }
}

// A call of the library that must succeed; its error, if any, is printed and freed. On success the library sets the error to NULL.
static inline void check_ok(lycore_status status, lycore_error **error, const char *text, const char *file, int line) {
    check_count++;
    if (status != LYCORE_OK || *error != NULL) {
        printf("%s:%d: %s: %s: %s (%s)\n", file, line, text, lycore_status_text(status), lycore_error_message(*error),
               lycore_error_hint(*error));
        lycore_error_free(*error);
        *error = NULL;
        check_failed();
    }
}

#define CHECK(condition) check_true((condition) ? 1 : 0, #condition, __FILE__, __LINE__)
#define CHECK_EQUAL(got, want) check_equal((int64_t)(got), (int64_t)(want), #got, __FILE__, __LINE__)
#define CHECK_TEXT(got, want) check_text(got, want, #got, __FILE__, __LINE__)
#define CHECK_CONTAINS(got, part) check_contains(got, part, #got, __FILE__, __LINE__)
#define CHECK_NEAR(got, want, tolerance) check_near(got, want, tolerance, #got, __FILE__, __LINE__)
#define CHECK_BYTES(got, want, size) check_bytes(got, want, size, #got, __FILE__, __LINE__)
// `call` passes `&error`, a variable of the place of use.
#define CHECK_OK(call) check_ok(call, &error, #call, __FILE__, __LINE__)

#endif
