/* The calls that ask first, on a file, and on a part of it that cannot be had.
 *
 *     ask FILE */

#include "check.h"
#include "faultless.h"

#define LEN (8ul << 20)

static void same(const void *bytes, size_t offset, size_t len)
{
    for (size_t i = 0; i < len / 8; i++)
        CHECK(((const uint64_t *)bytes)[i] == word(offset / 8 + i));
}

/* A thread that misses with SIGBUS blocked is killed. */
static void block_sigbus(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    make(argv[1], LEN);
    faultless_pool *pool;
    CHECK(faultless_pool_open(64 << 20, &pool) == 0);
    faultless_map *map;
    CHECK(faultless_map_open(pool, argv[1], FAULTLESS_RANDOM, &map) == 0);
    const char *bytes = faultless_map_data(map);
    block_sigbus();

    CHECK(faultless_load(map, 3 * PAGE, 9 * PAGE) == 0);
    same(bytes + 3 * PAGE, 3 * PAGE, 9 * PAGE);
    CHECK(faultless_load(map, LEN - PAGE, 2 * PAGE) == -1);
    CHECK(strlen(faultless_error()) > 0);

    struct faultless_range many[300];
    unsigned char failed[300];
    faultless_pin *pins[300];
    for (size_t i = 0; i < 300; i++)
        many[i] = (struct faultless_range){(i * 7919 % 1000) * 2 * PAGE, i % 3 * PAGE};
    CHECK(faultless_load_many(map, many, 300, failed) == 0);
    for (size_t i = 0; i < 300; i++) {
        CHECK(!failed[i]);
        same(bytes + many[i].offset, many[i].offset, many[i].len);
    }
    CHECK(faultless_load_many(map, NULL, 0, NULL) == 0);
    CHECK(faultless_load_many(map, NULL, 1, NULL) == -1);
    many[7].offset = LEN;
    many[7].len = 1;
    CHECK(faultless_load_many(map, many, 300, failed) == -1);
    CHECK(strstr(faultless_error(), "range 7"));
    CHECK(faultless_pin_many(map, many, 300, pins) == -1);
    for (size_t i = 0; i < 300; i++) {
        CHECK(failed[i] == (i == 7) && !pins[i] == (i == 7));
        faultless_unpin(pins[i]);
    }

    int to[2];
    CHECK(pipe(to) == 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        static char got[LEN];
        size_t n = 0;
        close(to[1]);
        for (ssize_t r; (r = read(to[0], got + n, LEN - n)) > 0;)
            n += (size_t)r;
        CHECK(n == 5 * PAGE + 3 * (LEN / 8));
        same(got, 2 * PAGE, n);
        _exit(0);
    }
    close(to[0]);
    CHECK(faultless_write_to(map, to[1], 2 * PAGE, 5 * PAGE + 3 * (LEN / 8)) == 0);
    close(to[1]);
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(faultless_write_to(map, -1, 0, PAGE) == -1);
    faultless_map_close(map);
    faultless_pool_close(pool);
    unlink(argv[1]);
    printf("asked\n");
    return 0;
}
