/* Mappings made while there is one thread, changed in ways that the C library sees and does not see, and read by a second thread.
 *
 *     later FILE   makes FILE.a to FILE.j; prints what holds by itself and served, and on stderr what lies at a mapping */

#include "check.h"
#include "past.h"

#define LEN (8ul << 20)

static const char *base;

static char *name(char letter)
{
    static char text[4096];
    snprintf(text, sizeof text, "%s.%c", base, letter);
    return text;
}

static char *map(char letter, int kind)
{
    int fd = open(name(letter), O_RDONLY);
    CHECK(fd >= 0);
    char *m = mmap(NULL, LEN, PROT_READ, kind, fd, 0);
    CHECK(m != MAP_FAILED);
    close(fd);
    return m;
}

/* Whether the kernel has the file itself mapped there. */
static int kernels(const void *at, char letter)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[4500], file[4096];
    int found = 0;
    snprintf(file, sizeof file, "%s", strrchr(name(letter), '/'));
    while (fgets(line, sizeof line, maps)) {
        unsigned long from, to;
        if (sscanf(line, "%lx-%lx", &from, &to) == 2 && from <= (unsigned long)at && (unsigned long)at < to)
            found = strstr(line, file) != NULL;
    }
    fclose(maps);
    return found;
}

static int threads(void)
{
    struct stat st;
    CHECK(stat("/proc/self/task", &st) == 0);
    return (int)st.st_nlink - 2;
}

static long locked(void)
{
    FILE *status = fopen("/proc/self/status", "r");
    char line[200];
    long kb = -1;
    while (fgets(line, sizeof line, status))
        sscanf(line, "VmLck: %ld", &kb);
    fclose(status);
    return kb;
}

static char *plain, *shared, *changed, *held, *gone, *other, *random_, *cut, *guarded, *writable;

static void *second(void *unused)
{
    (void)unused;
    verify(plain, 0, 0, LEN);
    verify(shared, 0, 0, LEN);
    verify(random_, 0, 0, LEN);
    CHECK(changed[PAGE] == '!');
    changed[PAGE] = (char)(word(PAGE / 8) & 0xFF);
    verify(changed, 0, 0, LEN);
    verify(held, 0, 0, LEN);
    verify(other, 0, 0, LEN);
    verify(cut + PAGE, PAGE, 0, LEN - PAGE);
    verify(guarded, 0, 0, LEN - PAGE);
    verify(writable, 0, 0, LEN);
    return NULL;
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    base = argv[1];
    for (char letter = 'a'; letter <= 'j'; letter++)
        make(name(letter), LEN);

    plain = map('a', MAP_PRIVATE);
    shared = map('b', MAP_SHARED);
    changed = map('c', MAP_PRIVATE);
    held = map('d', MAP_PRIVATE);
    gone = map('e', MAP_PRIVATE);
    other = map('e', MAP_PRIVATE);
    random_ = map('f', MAP_SHARED);
    cut = map('g', MAP_PRIVATE);
    guarded = map('i', MAP_PRIVATE);
    writable = map('j', MAP_SHARED);
    CHECK(threads() == 1);
    CHECK(kernels(plain, 'a') && kernels(shared, 'b') && kernels(random_, 'f'));
    /* A part is read already. */
    verify(plain, 0, 0, LEN / 8);

    /* Past the C library, so that no function of it can have noted it. */
    CHECK(past(SYS_mprotect, (long)(changed + PAGE), PAGE, PROT_READ | PROT_WRITE, 0, 0, 0) == 0);
    changed[PAGE] = '!';
    CHECK(past(SYS_mlock, (long)held, PAGE, 0, 0, 0, 0) == 0);
    CHECK(past(SYS_munmap, (long)gone, LEN, 0, 0, 0, 0) == 0);
    int fd = open(name('h'), O_RDONLY);
    CHECK(past(SYS_mmap, (long)other, LEN, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 0) == (long)other);
    close(fd);
    CHECK(past(SYS_munmap, (long)cut, PAGE, 0, 0, 0, 0) == 0);
    CHECK(madvise(random_, LEN, MADV_RANDOM) == 0);
    /* A guard, where the kernel has them for files (6.15), at the end. */
    int guard = past(SYS_madvise, (long)(guarded + LEN - PAGE), PAGE, 102, 0, 0, 0) == 0;
    /* The same file in the same place, but by a descriptor that is open for writing. */
    fd = open(name('j'), O_RDWR);
    CHECK(past(SYS_mmap, (long)writable, LEN, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == (long)writable);
    close(fd);
    long kb = locked();

    /* A child has what its parent has. */
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        CHECK(threads() == 1);
        verify(plain, 0, 0, LEN);
        verify(other, 0, 0, LEN);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    /* (It has read them into the page cache.) */
    for (char letter = 'a'; letter <= 'j'; letter++) {
        fd = open(name(letter), O_RDONLY);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }

    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, second, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(locked() == kb);
    CHECK(kernels(changed, 'c') && kernels(held, 'd') && kernels(other, 'h'));
    fprintf(stderr, "plain %d, shared %d, random %d\n", kernels(plain, 'a'), kernels(shared, 'b'), kernels(random_, 'f'));

    CHECK(!guard || kernels(guarded, 'i'));
    CHECK(mprotect(writable, PAGE, PROT_READ | PROT_WRITE) == 0);
    const char *now = map('e', MAP_SHARED);
    verify(now, 0, 0, LEN);
    printf("all bytes are right, %ld kB locked\n", kb);
    for (char letter = 'a'; letter <= 'j'; letter++)
        unlink(name(letter));
    return 0;
}
