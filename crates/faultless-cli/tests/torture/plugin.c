/* A plugin that is opened with RTLD_DEEPBIND: its calls go to the C library, past whatever was preloaded. */

#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

int plugin_unmap(void *at, size_t len) { return munmap(at, len); }

void *plugin_map(size_t len, int byte)
{
    void *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(at, byte, len);
    return at;
}
