/* The engine is called in a destructor of thread-specific data, when all that is local to the thread is gone.
 *
 *     last FILE */

#include "check.h"
#include "faultless.h"

static const char *path;
static faultless_pool *pool;
static int called;

static void destroyed(void *unused)
{
    (void)unused;
    faultless_map *map;
    /* One that fails, and ones that do not. */
    CHECK(faultless_map_open(pool, "/does/not/exist", 0, &map) == -1);
    CHECK(faultless_error() != NULL);
    CHECK(faultless_map_open(pool, path, 0, &map) == 0);
    const unsigned char *bytes = faultless_map_data(map);
    CHECK(bytes[4096] == 'a' + (unsigned char)(word(512) & 0xFF) - 'a');
    faultless_pin *pin;
    CHECK(faultless_pin_range(map, 0, 8192, &pin) == 0);
    faultless_unpin(pin);
    CHECK(faultless_prefetch(map, 0, 8192) == 0);
    faultless_map_close(map);
    faultless_pool *other;
    CHECK(faultless_pool_open(8 << 20, &other) == 0);
    faultless_pool_close(other);
    called++;
}

static void *thread(void *key)
{
    CHECK(faultless_error() != NULL);
    CHECK(pthread_setspecific(*(pthread_key_t *)key, key) == 0);
    return NULL;
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    path = argv[1];
    make(path, 1 << 20);
    CHECK(faultless_pool_open(8 << 20, &pool) == 0);
    pthread_key_t key;
    CHECK(pthread_key_create(&key, destroyed) == 0);
    pthread_t t;
    CHECK(pthread_create(&t, NULL, thread, &key) == 0);
    CHECK(pthread_join(t, NULL) == 0);
    CHECK(called == 1);
    printf("called\n");
    unlink(path);
    return 0;
}
