/* SIGBUS is the program's own as far as it can see, and misses are served whatever it blocks. */
#include "check.h"

static const char *map;
static const size_t len = 16 << 20;
static size_t next;
static volatile sig_atomic_t calls, code;

/* A miss. */
static void miss(void)
{
    next += PAGE * 3;
    verify(map, 0, next, next + PAGE);
}
static void on_usr1(int signo)
{
    (void)signo;
    miss();
    calls++;
}
static void first(int signo) { (void)signo; calls += 100; }
static void second(int signo, siginfo_t *info, void *context)
{
    (void)signo;
    (void)context;
    code = info->si_code;
    calls += 1000;
}
static void *in_thread(void *unused)
{
    (void)unused;
    miss();
    return NULL;
}

int main(int argc, char **argv)
{
    (void)argc;
    make(argv[1], len);
    struct sigaction sa = { .sa_handler = first }, old;
    sigaddset(&sa.sa_mask, SIGUSR2);
    CHECK(sigaction(SIGBUS, &sa, NULL) == 0);
    map = map_file(argv[1], 0, len);
    miss();
    /* The program's own handler is what it finds, not ours. */
    CHECK(sigaction(SIGBUS, NULL, &old) == 0 && old.sa_handler == first && sigismember(&old.sa_mask, SIGUSR2) == 1);
    struct sigaction sb = { .sa_sigaction = second, .sa_flags = SA_SIGINFO };
    CHECK(sigaction(SIGBUS, &sb, &old) == 0 && old.sa_handler == first);
    CHECK(sigaction(SIGBUS, NULL, &old) == 0 && old.sa_sigaction == second && old.sa_flags & SA_SIGINFO);
    CHECK((void *)signal(SIGBUS, first) == (void *)second && signal(SIGBUS, SIG_DFL) == first);
    CHECK(sigaction(SIGBUS, &sb, NULL) == 0);
    miss();
    CHECK(calls == 0);
    /* Sent by somebody: the program's. */
    CHECK(raise(SIGBUS) == 0 && calls == 1000 && code <= 0);
    miss();
    /* Blocked, as far as the program can see. */
    sigset_t all, was, none;
    sigfillset(&all);
    sigemptyset(&none);
    CHECK(sigprocmask(SIG_BLOCK, &all, &was) == 0 && sigismember(&was, SIGBUS) == 0);
    CHECK(sigprocmask(SIG_BLOCK, NULL, &was) == 0 && sigismember(&was, SIGBUS) == 1 && sigismember(&was, SIGUSR1) == 1);
    miss();
    pthread_t t;
    CHECK(pthread_create(&t, NULL, in_thread, NULL) == 0 && pthread_join(t, NULL) == 0);
    CHECK(pthread_sigmask(SIG_SETMASK, &none, &was) == 0 && sigismember(&was, SIGBUS) == 1);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &was) == 0 && sigismember(&was, SIGBUS) == 0);
    /* In a handler that blocks everything, and while waiting with everything else blocked. */
    struct sigaction su = { .sa_handler = on_usr1 };
    sigfillset(&su.sa_mask);
    CHECK(sigaction(SIGUSR1, &su, NULL) == 0);
    calls = 0;
    CHECK(raise(SIGUSR1) == 0 && calls == 1);
    CHECK(sigprocmask(SIG_BLOCK, &all, NULL) == 0 && raise(SIGUSR1) == 0 && calls == 1);
    sigset_t but = all;
    sigdelset(&but, SIGUSR1);
    CHECK(sigsuspend(&but) == -1 && errno == EINTR && calls == 2);
    CHECK(raise(SIGUSR1) == 0 && ppoll(NULL, 0, NULL, &but) == -1 && errno == EINTR && calls == 3);
    CHECK(raise(SIGUSR1) == 0 && pselect(0, NULL, NULL, NULL, NULL, &but) == -1 && errno == EINTR && calls == 4);
    CHECK(sigprocmask(SIG_SETMASK, &none, NULL) == 0);
    /* A fault that is really the program's ends it, as it must. */
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        signal(SIGBUS, SIG_DFL);
        char small[100];
        snprintf(small, sizeof small, "%s.small", argv[1]);
        int fd = open(small, O_RDWR | O_CREAT | O_TRUNC, 0600);
        CHECK(ftruncate(fd, PAGE) == 0);
        const volatile char *m = mmap(NULL, 4 << 20, PROT_READ, MAP_SHARED, fd, 0);
        unlink(small);
        (void)m[0];
        (void)m[2 << 20];
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    if (argc > 2) {
        /* In this very process, where the engine's handler is in place. */
        signal(SIGBUS, SIG_DFL);
        const volatile char *m = map_file(argv[1], 0, len + (4 << 20));
        (void)m[len];
        return 0;
    }
    printf("good\n");
    return 0;
}
