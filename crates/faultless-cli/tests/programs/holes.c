/* A program unmaps parts of what it has reserved. What is not mapped any more stays so while files are read and read again: neither the
 * engine nor its threads move in, since the program may unmap all of the range again.
 *
 *     holes FILE */
#include "check.h"

enum { READERS = 4 };
static const size_t LEN = 256ul << 20, RESERVED = 1ul << 30;
static const char *map;
static pthread_barrier_t ready;

static char *reserved[2];
static struct { char *at; size_t len; } hole[16];
static int reservations, holes;

/* Takes the address space that the kernel would give out next, and unmaps some parts of it. */
static void reserve(const size_t *lens, int count)
{
    char *at = mmap(NULL, RESERVED, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(at != MAP_FAILED);
    reserved[reservations++] = at;
    for (int i = 0; i < count; i++) {
        at += PAGE;
        CHECK(munmap(at, lens[i]) == 0);
        hole[holes].at = at;
        hole[holes++].len = lens[i];
        at += lens[i];
    }
}

static void *reader(void *of)
{
    size_t k = (size_t)of;
    pthread_barrier_wait(&ready);
    for (int round = 0; round < 2; round++)
        verify(map, 0, k * (LEN / READERS), (k + 1) * (LEN / READERS));
    return NULL;
}

int main(int argc, char **argv)
{
    (void)argc;
    make(argv[1], LEN);
    CHECK(pthread_barrier_init(&ready, NULL, READERS + 1) == 0);
    pthread_t readers[READERS];
    for (size_t k = 0; k < READERS; k++)
        CHECK(pthread_create(&readers[k], NULL, reader, (void *)k) == 0);
    static char line[4400];
    FILE *maps = fopen("/proc/self/maps", "r");
    CHECK(maps && fgets(line, sizeof line, maps));
    /* The C library maps an arena of 64 MiB for the first thread that starts threads, when the first file is mapped. Of a program with
     * several threads, as this one, it may take a hole (see alone.c): no hole of before has room for it. */
    static const size_t before[] = { PAGE, 16 * PAGE, 1 << 20, 4 << 20, 48 << 20 };
    reserve(before, sizeof before / sizeof *before);
    map = map_file(argv[1], 0, LEN);
    verify(map, 0, 0, PAGE);
    static const size_t after[] = { 2 * PAGE, 3 << 20, 64 << 20, 300 << 20 };
    reserve(after, sizeof after / sizeof *after);
    pthread_barrier_wait(&ready);
    CHECK(madvise((void *)map, LEN, MADV_WILLNEED) == 0);
    for (int i = 0; i < READERS; i++)
        CHECK(pthread_join(readers[i], NULL) == 0);
    CHECK(fseek(maps, 0, SEEK_SET) == 0);
    int found = 0;
    while (fgets(line, sizeof line, maps)) {
        size_t from, to;
        CHECK(sscanf(line, "%lx-%lx", &from, &to) == 2);
        for (int i = 0; i < holes; i++)
            if (from < (size_t)hole[i].at + hole[i].len && (size_t)hole[i].at < to) {
                found++;
                fprintf(stderr, "in a hole of %zu bytes at %p: %s", hole[i].len, (void *)hole[i].at, line);
            }
    }
    CHECK(found == 0);
    for (int i = 0; i < reservations; i++)
        CHECK(munmap(reserved[i], RESERVED) == 0);
    verify(map, 0, 0, LEN);
    puts("holes: done");
    return 0;
}
