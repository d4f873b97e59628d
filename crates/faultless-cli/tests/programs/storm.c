/* Threads map, read, cut and unmap parts of one file, while others open it for writing and a third kind maps memory. */
#include "check.h"

static const size_t len = 32 << 20;
static const char *path;
static volatile int stop;
static volatile long rounds;

static void *mapper(void *arg)
{
    uint64_t x = (uintptr_t)arg * 77 + 5;
    while (!stop) {
        x = x * 6364136223846793005ull + 1442695040888963407ull;
        size_t off = (x >> 20) % 1024 * PAGE, n = len - off - (x >> 40) % 1000 * PAGE;
        const char *m = map_file(path, off, n);
        for (int i = 0; i < 40; i++) {
            x = x * 6364136223846793005ull + 1442695040888963407ull;
            size_t at = (x >> 33) % (n / PAGE) * PAGE;
            verify(m, off, at, at + PAGE);
        }
        if (x & 1 << 10) {
            size_t cut = n / 2 & ~(PAGE - 1);
            CHECK(munmap((void *)(m + cut), n - cut) == 0);
            verify(m, off, 0, PAGE * 20);
            n = cut;
        }
        CHECK(munmap((void *)m, n) == 0);
        __atomic_add_fetch(&rounds, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}
static const char *shared;
static void *reader(void *arg)
{
    uint64_t x = (uintptr_t)arg * 991 + 3;
    while (!stop) {
        x = x * 6364136223846793005ull + 1442695040888963407ull;
        size_t at = (x >> 33) % (len / PAGE) * PAGE;
        verify(shared, 0, at, at + PAGE);
    }
    return NULL;
}
static void *writer(void *unused)
{
    (void)unused;
    while (!stop) {
        int fd = open(path, O_RDWR);
        CHECK(fd >= 0);
        usleep(2000);
        close(fd);
        usleep(8000);
    }
    return NULL;
}
static void *churn(void *unused)
{
    (void)unused;
    while (!stop) {
        size_t n = 3 << 20;
        char *m = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(m != MAP_FAILED);
        for (size_t i = 0; i < n; i += 16 * PAGE) {
            CHECK(m[i] == 0);
            m[i] = 1;
        }
        CHECK(munmap(m, n) == 0);
    }
    return NULL;
}
static void *forker(void *unused)
{
    (void)unused;
    while (!stop) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            verify(shared, 0, 5 << 20, (5 << 20) + 50 * PAGE);
            _exit(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        usleep(3000);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    (void)argc;
    path = argv[1];
    make(path, len);
    shared = map_file(path, 0, len);
    pthread_t t[9];
    int n = 0;
    for (long i = 0; i < 3; i++)
        CHECK(pthread_create(&t[n++], NULL, mapper, (void *)i) == 0);
    for (long i = 0; i < 2; i++)
        CHECK(pthread_create(&t[n++], NULL, reader, (void *)i) == 0);
    CHECK(pthread_create(&t[n++], NULL, churn, NULL) == 0);
    CHECK(pthread_create(&t[n++], NULL, forker, NULL) == 0);
    usleep(700000);
    CHECK(pthread_create(&t[n++], NULL, writer, NULL) == 0);
    usleep(1500000);
    stop = 1;
    for (int i = 0; i < n; i++)
        CHECK(pthread_join(t[i], NULL) == 0);
    CHECK(rounds > 0);
    printf("good\n");
    return 0;
}
