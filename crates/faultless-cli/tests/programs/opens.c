/* A library whose constructor creates the program's second thread, while a mapping waits for one.
 *
 *     opens LIBRARY FILE     (with -DLIBRARY: the library) */

#include "check.h"
#include <dlfcn.h>

#ifdef LIBRARY
static void *nothing(void *unused)
{
    return unused;
}

__attribute__((constructor)) static void starts(void)
{
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, nothing, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}
#else
int main(int argc, char **argv)
{
    CHECK(argc == 3);
    const size_t len = 8 << 20;
    make(argv[2], len);
    const char *map = map_file(argv[2], 0, len);
    CHECK(dlopen(argv[1], RTLD_NOW) != NULL);
    verify(map, 0, 0, len);
    printf("all bytes are right\n");
    unlink(argv[2]);
    return 0;
}
#endif
