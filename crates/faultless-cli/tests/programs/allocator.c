/* A memory allocator that makes a system call about memory in each of its functions, while it holds its own lock, and maps
 * memory while it prepares itself. Whoever stands before mmap, munmap, madvise and mremap and asks for memory there waits for
 * itself. It never gives memory out twice, which is enough for a test.
 *
 * Built as a library that is preloaded, or linked. */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned char *next, *end;

static void call_all(void)
{
    unsigned char *m = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(m, 8192, MADV_DONTNEED);
    m = mremap(m, 8192, 4096, 0);
    munmap(m, 4096);
}

static void *take(size_t size, size_t align)
{
    if (align < 16)
        align = 16;
    pthread_mutex_lock(&lock);
    call_all();
    uintptr_t at = ((uintptr_t)next + 16 + align - 1) & ~(align - 1);
    if (!next || at + size > (uintptr_t)end) {
        size_t chunk = size + align + (64 << 20);
        next = mmap(NULL, chunk, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        end = next + chunk;
        at = ((uintptr_t)next + 16 + align - 1) & ~(align - 1);
    }
    ((size_t *)at)[-1] = size;
    next = (unsigned char *)at + size;
    pthread_mutex_unlock(&lock);
    return (void *)at;
}

void *malloc(size_t size) { return take(size, 16); }
void *calloc(size_t n, size_t size) { return take(n * size, 16); }
void *memalign(size_t align, size_t size) { return take(size, align); }
void *aligned_alloc(size_t align, size_t size) { return take(size, align); }
int posix_memalign(void **to, size_t align, size_t size)
{
    *to = take(size, align);
    return 0;
}
void free(void *at)
{
    if (!at)
        return;
    pthread_mutex_lock(&lock);
    call_all();
    pthread_mutex_unlock(&lock);
}
void *realloc(void *at, size_t size)
{
    void *to = take(size, 16);
    if (at) {
        size_t old = ((size_t *)at)[-1];
        memcpy(to, at, old < size ? old : size);
    }
    return to;
}
