/*
 * Counts lines that contain a word, in a file of any size, within 64 MiB of memory.
 *
 *     cc -O2 -Iinclude -o search search.c -L../../target/release -lfaultless_preload -Wl,-rpath,$PWD/../../target/release
 *     ./search needle big.log
 */
#define _GNU_SOURCE
#include <faultless.h>
#include <stdio.h>
#include <string.h>

static int fail(const char *what)
{
    fprintf(stderr, "search: %s: %s\n", what, faultless_error());
    return 1;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: search WORD FILE\n");
        return 2;
    }
    faultless_pool *pool;
    faultless_map *map;
    if (faultless_pool_open(64 << 20, &pool) != 0)
        return fail("no pool");
    if (faultless_map_open(pool, argv[2], FAULTLESS_SEQUENTIAL, &map) != 0)
        return fail("no map");

    const char *at = faultless_map_data(map), *end = at + faultless_map_len(map);
    const char *first = NULL, *first_end = NULL;
    unsigned long lines = 0;
    while (at < end) {
        /* Plain memory: what is not there is read when it is touched. */
        const char *found = memmem(at, (size_t)(end - at), argv[1], strlen(argv[1]));
        if (!found)
            break;
        lines++;
        const char *newline = memchr(found, '\n', (size_t)(end - found));
        at = newline ? newline + 1 : end;
        if (!first) {
            first = found;
            first_end = at;
        }
    }
    if (first) {
        /* What is handed to the kernel has to be there: pinned, it is. */
        faultless_pin *pin;
        size_t offset = (size_t)(first - (const char *)faultless_map_data(map));
        if (faultless_pin_range(map, offset, (size_t)(first_end - first), &pin) != 0)
            return fail("cannot pin");
        fwrite(first, 1, (size_t)(first_end - first), stdout);
        faultless_unpin(pin);
    }
    struct faultless_stats stats;
    if (faultless_pool_stats(pool, &stats, sizeof stats) != 0)
        return fail("no stats");
    printf("%lu lines; %llu MiB read, %llu MiB of memory at most\n", lines, (unsigned long long)stats.bytes_read >> 20,
           (unsigned long long)stats.peak >> 20);
    faultless_map_close(map);
    faultless_pool_close(pool);
    return 0;
}
