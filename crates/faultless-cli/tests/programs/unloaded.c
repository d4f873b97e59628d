/* A library that has the engine in it is unloaded: the SIGBUS handler is still there, and passes on what is not its own. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static void fail(const char *what)
{
    fprintf(stderr, "unloaded: %s\n", what);
    exit(1);
}

struct calls {
    int (*open_pool)(uint64_t, void **);
    void (*close_pool)(void *);
};

static void *use(void *of)
{
    struct calls *calls = of;
    void *pool;
    if (calls->open_pool(16 << 20, &pool))
        fail("no pool");
    calls->close_pool(pool);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        fail("usage: unloaded LIBRARY EMPTY-FILE");
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library)
        fail(dlerror());
    int (*open_pool)(uint64_t, void **) = (int (*)(uint64_t, void **))dlsym(library, "faultless_pool_open");
    void (*close_pool)(void *) = (void (*)(void *))dlsym(library, "faultless_pool_close");
    /* (In a thread that ends: what it leaves for its end would keep the library by itself.) */
    struct calls calls = {open_pool, close_pool};
    pthread_t thread;
    if (!open_pool || !close_pool || pthread_create(&thread, NULL, use, &calls))
        fail("no pool");
    pthread_join(thread, NULL);
    dlclose(library);
    struct sigaction now;
    sigaction(SIGBUS, NULL, &now);
    if (now.sa_handler == SIG_DFL) {
        puts("no engine here");
        return 0;
    }
    Dl_info info;
    if (!dladdr((void *)(uintptr_t)now.sa_sigaction, &info))
        fail("the handler's code is gone");
    pid_t child = fork();
    if (child == 0) {
        int fd = open(argv[2], O_RDONLY);
        volatile char *past = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
        return past[0];
    }
    int status;
    waitpid(child, &status, 0);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGBUS)
        fail("a fault of the program's own did not end it by SIGBUS");
    puts("the handler stays");
    return 0;
}
