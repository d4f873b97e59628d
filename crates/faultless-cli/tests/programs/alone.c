/* A program with one thread unmaps a part of what it has reserved, and maps its first file then. The C library maps an arena of 64 MiB for
 * the first thread of the engine's that starts threads: not in that hole, since the program may unmap all of the range again.
 *
 *     alone FILE */
#include "check.h"

int main(int argc, char **argv)
{
    (void)argc;
    static const size_t LEN = 16ul << 20, RESERVED = 4ul << 30, HOLE = 3ul << 30;
    make(argv[1], LEN);
    static char line[4400];
    FILE *maps = fopen("/proc/self/maps", "r");
    CHECK(maps && fgets(line, sizeof line, maps));
    char *reserved = mmap(NULL, RESERVED, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(reserved != MAP_FAILED);
    char *hole = reserved + PAGE;
    CHECK(munmap(hole, HOLE) == 0);
    const char *map = map_file(argv[1], 0, LEN);
    verify(map, 0, 0, LEN / 2);
    int found = 0;
    CHECK(fseek(maps, 0, SEEK_SET) == 0);
    while (fgets(line, sizeof line, maps)) {
        size_t from, to;
        CHECK(sscanf(line, "%lx-%lx", &from, &to) == 2);
        /* (What the program itself maps comes to lie there.) */
        if (from < (size_t)hole + HOLE && (size_t)hole < to && from != (size_t)map) {
            found++;
            fprintf(stderr, "in a hole at %p: %s", (void *)hole, line);
        }
    }
    CHECK(found == 0);
    CHECK(munmap((void *)map, LEN) == 0);
    CHECK(munmap(reserved, RESERVED) == 0);
    map = map_file(argv[1], 0, LEN);
    verify(map, 0, 0, LEN);
    CHECK(munmap((void *)map, LEN) == 0);
    puts("alone: done");
    return 0;
}
