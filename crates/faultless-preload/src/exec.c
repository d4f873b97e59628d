/* execl, execlp and execle: their arguments, which Rust cannot collect, in a list. */

#include <stdarg.h>
#include <stddef.h>

extern char **environ;
int faultless_execv(const char *path, char *const arguments[], char *const environment[]);
int faultless_execvp(const char *name, char *const arguments[]);

/* Counts the arguments from `first` on, then lays them out behind it, with a null pointer at the end. On the stack, as the C
 * library does: this is called between fork and exec. */
#define COLLECT(first)                                                                                                \
    va_list args;                                                                                                     \
    size_t count = 1;                                                                                                 \
    va_start(args, first);                                                                                            \
    if (first)                                                                                                        \
        while (va_arg(args, char *))                                                                                  \
            count++;                                                                                                  \
    va_end(args);                                                                                                     \
    char *list[count + 1];                                                                                            \
    list[0] = (char *)first;                                                                                          \
    va_start(args, first);                                                                                            \
    for (size_t i = 1; first && i <= count; i++)                                                                      \
        list[i] = va_arg(args, char *);                                                                               \
    list[count] = NULL

int faultless_execl(const char *path, const char *first, ...)
{
    COLLECT(first);
    va_end(args);
    return faultless_execv(path, list, environ);
}

int faultless_execlp(const char *name, const char *first, ...)
{
    COLLECT(first);
    va_end(args);
    return faultless_execvp(name, list);
}

int faultless_execle(const char *path, const char *first, ...)
{
    COLLECT(first);
    char *const *environment = va_arg(args, char *const *);
    va_end(args);
    return faultless_execv(path, list, environment);
}
