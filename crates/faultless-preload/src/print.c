/* printf and its kin. Older C libraries hand a long string that is to be printed on to the kernel as it is; where it lies
 * in a mapping that is taken over, it may be absent. So the text is made in memory first, which reads the string as any
 * program does. The memory is written by fwrite of stdio.rs or write of writes.rs. */

#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <dlfcn.h>

int faultless_preload_active(void);

typedef int (*stream_print)(FILE *, const char *, va_list);
typedef int (*stream_print_chk)(FILE *, int, const char *, va_list);
typedef int (*number_print)(int, const char *, va_list);
typedef int (*number_print_chk)(int, int, const char *, va_list);

static stream_print real_vfprintf;
static stream_print_chk real_vfprintf_chk;
static number_print real_vdprintf;
static number_print_chk real_vdprintf_chk;

/* Looks them up: before `main`, and again by a call that comes earlier still. */
void faultless_find_prints(void)
{
    real_vfprintf = (stream_print)dlsym(RTLD_NEXT, "vfprintf");
    real_vfprintf_chk = (stream_print_chk)dlsym(RTLD_NEXT, "__vfprintf_chk");
    real_vdprintf = (number_print)dlsym(RTLD_NEXT, "vdprintf");
    real_vdprintf_chk = (number_print_chk)dlsym(RTLD_NEXT, "__vdprintf_chk");
}

#define REAL(name)                                                                                                    \
    if (!real_##name)                                                                                                 \
        faultless_find_prints()

int faultless_vfprintf(FILE *stream, const char *format, va_list args)
{
    REAL(vfprintf);
    if (!faultless_preload_active())
        return real_vfprintf(stream, format, args);
    char *text = NULL;
    int len = vasprintf(&text, format, args);
    if (len < 0)
        return len;
    size_t wrote = fwrite(text, 1, (size_t)len, stream);
    free(text);
    return wrote == (size_t)len ? len : -1;
}

int faultless_vfprintf_chk(FILE *stream, int flag, const char *format, va_list args)
{
    REAL(vfprintf_chk);
    if (!faultless_preload_active())
        return real_vfprintf_chk(stream, flag, format, args);
    return faultless_vfprintf(stream, format, args);
}

int faultless_vdprintf(int fd, const char *format, va_list args)
{
    REAL(vdprintf);
    if (!faultless_preload_active())
        return real_vdprintf(fd, format, args);
    char *text = NULL;
    int len = vasprintf(&text, format, args);
    if (len < 0)
        return len;
    int done = 0;
    while (done < len) {
        ssize_t n = write(fd, text + done, (size_t)(len - done));
        if (n < 0)
            break;
        done += (int)n;
    }
    free(text);
    return done == len ? len : -1;
}

int faultless_vdprintf_chk(int fd, int flag, const char *format, va_list args)
{
    REAL(vdprintf_chk);
    if (!faultless_preload_active())
        return real_vdprintf_chk(fd, flag, format, args);
    return faultless_vdprintf(fd, format, args);
}

int faultless_vprintf(const char *format, va_list args)
{
    return faultless_vfprintf(stdout, format, args);
}

int faultless_vprintf_chk(int flag, const char *format, va_list args)
{
    return faultless_vfprintf_chk(stdout, flag, format, args);
}

#define VARIADIC(name, fixed, call)                                                                                   \
    int name fixed                                                                                                    \
    {                                                                                                                 \
        va_list args;                                                                                                 \
        va_start(args, format);                                                                                       \
        int result = call;                                                                                            \
        va_end(args);                                                                                                 \
        return result;                                                                                                \
    }

VARIADIC(faultless_printf, (const char *format, ...), faultless_vfprintf(stdout, format, args))
VARIADIC(faultless_fprintf, (FILE *stream, const char *format, ...), faultless_vfprintf(stream, format, args))
VARIADIC(faultless_dprintf, (int fd, const char *format, ...), faultless_vdprintf(fd, format, args))
VARIADIC(faultless_printf_chk, (int flag, const char *format, ...), faultless_vfprintf_chk(stdout, flag, format, args))
VARIADIC(faultless_fprintf_chk, (FILE *stream, int flag, const char *format, ...),
         faultless_vfprintf_chk(stream, flag, format, args))
VARIADIC(faultless_dprintf_chk, (int fd, int flag, const char *format, ...),
         faultless_vdprintf_chk(fd, flag, format, args))
