/* RocksDB with mapped reads: a database is made, closed, dropped from memory, and read at random by four threads.
 *
 *     rocks make DIR     200,000 keys, in tables of 8 MiB
 *     rocks read DIR     what is found, in one line */
#include "check.h"
#include <rocksdb/c.h>

enum { KEYS = 200000, THREADS = 4, READS = 20000 };

static void value_of(unsigned key, char value[200])
{
    for (int i = 0; i < 25; i++)
        memcpy(value + i * 8, &(uint64_t){ word(key * 25ull + i) }, 8);
}

static rocksdb_t *db;
static rocksdb_readoptions_t *reading;

static void *reader(void *number)
{
    unsigned key = (unsigned)(size_t)number * 7919, found = 0;
    for (int i = 0; i < READS; i++) {
        key = (key * 1103515245u + 12345) % (KEYS * 5 / 4);
        char name[16], expected[200], *error = NULL;
        size_t len;
        snprintf(name, sizeof name, "%010u", key);
        rocksdb_pinnableslice_t *slice = rocksdb_get_pinned(db, reading, name, 10, &error);
        CHECK(error == NULL && (slice != NULL) == (key < KEYS));
        if (slice) {
            value_of(key, expected);
            const char *value = rocksdb_pinnableslice_value(slice, &len);
            CHECK(len == sizeof expected && memcmp(value, expected, len) == 0);
            rocksdb_pinnableslice_destroy(slice);
            found++;
        }
    }
    return (void *)(size_t)found;
}

int main(int argc, char **argv)
{
    CHECK(argc == 3);
    int making = !strcmp(argv[1], "make");
    char *error = NULL;
    rocksdb_options_t *options = rocksdb_options_create();
    rocksdb_options_set_create_if_missing(options, 1);
    rocksdb_options_set_compression(options, rocksdb_no_compression);
    rocksdb_options_set_target_file_size_base(options, 8 << 20);
    rocksdb_options_set_allow_mmap_reads(options, 1);
    db = making ? rocksdb_open(options, argv[2], &error) : rocksdb_open_for_read_only(options, argv[2], 0, &error);
    CHECK(error == NULL);
    if (making) {
        rocksdb_writeoptions_t *writing = rocksdb_writeoptions_create();
        for (unsigned key = 0; key < KEYS; key++) {
            char name[16], value[200];
            snprintf(name, sizeof name, "%010u", key);
            value_of(key, value);
            rocksdb_put(db, writing, name, 10, value, sizeof value, &error);
            CHECK(error == NULL);
        }
        rocksdb_compact_range(db, NULL, 0, NULL, 0);
        rocksdb_close(db);
        return 0;
    }
    reading = rocksdb_readoptions_create();
    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(threads + i, NULL, reader, (void *)i) == 0);
    size_t all = 0;
    for (int i = 0; i < THREADS; i++) {
        void *found;
        CHECK(pthread_join(threads[i], &found) == 0);
        all += (size_t)found;
    }
    /* In order, from end to end. */
    unsigned keys = 0;
    rocksdb_iterator_t *each = rocksdb_create_iterator(db, reading);
    for (rocksdb_iter_seek_to_first(each); rocksdb_iter_valid(each); rocksdb_iter_next(each))
        keys++;
    rocksdb_iter_destroy(each);
    rocksdb_close(db);
    printf("%zu found, %u keys\n", all, keys);
    return 0;
}
