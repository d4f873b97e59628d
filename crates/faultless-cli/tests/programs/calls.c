/* Every function that hands the kernel memory to read, with memory that is absent. */
#include "check.h"
#include <dirent.h>
#include <netinet/in.h>
#include <sys/statfs.h>
#include <sys/xattr.h>

static const char *map;
static size_t len = 64 << 20;
static char *copy;

/* Makes the whole map absent, and gives a place in it. */
static const char *cold(size_t at)
{
    CHECK(madvise((void *)map, len, MADV_DONTNEED) == 0);
    return map + at;
}

static const char *absent(const char *at, size_t n)
{
    CHECK(madvise((void *)at, n, MADV_DONTNEED) == 0);
    return at;
}

static int out;
static void got(size_t at, size_t n)
{
    char *b = malloc(n);
    CHECK(pread(out, b, n, 0) == (ssize_t)n);
    CHECK(memcmp(b, copy + at, n) == 0);
    struct stat st;
    CHECK(fstat(out, &st) == 0 && st.st_size == (off_t)n);
    CHECK(ftruncate(out, 0) == 0 && lseek(out, 0, SEEK_SET) == 0);
    free(b);
}

static int pair[2];
static size_t expected;
static size_t expected_at;
static void *reader(void *unused)
{
    (void)unused;
    char *b = malloc(expected);
    size_t n = 0;
    while (n < expected) {
        ssize_t r = read(pair[1], b + n, expected - n);
        CHECK(r > 0);
        n += r;
    }
    CHECK(memcmp(b, copy + expected_at, n) == 0);
    free(b);
    return NULL;
}
static pthread_t t;
static void expect(size_t at, size_t n)
{
    expected = n;
    expected_at = at;
    CHECK(pthread_create(&t, NULL, reader, NULL) == 0);
}
static void done(void) { CHECK(pthread_join(t, NULL) == 0); }

int main(int argc, char **argv)
{
    (void)argc;
    make(argv[1], len);
    copy = malloc(len);
    int fd = open(argv[1], O_RDONLY);
    CHECK(pread(fd, copy, len, 0) == (ssize_t)len);
    CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    map = map_file(argv[1], 0, len);
    /* Nothing that can be read lies behind it, now or later. */
    if (mmap((char *)map + len, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED)
        CHECK(errno == EEXIST && mprotect((char *)map + len, PAGE, PROT_NONE) == 0);
    char path[4096];
    snprintf(path, sizeof path, "%s.out", argv[1]);
    out = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(out >= 0);
    const size_t odd = 12345, n = 10 << 20;

    CHECK(write(out, cold(odd), 100) == 100);
    got(odd, 100);
    CHECK(write(out, cold(odd), n) == (ssize_t)n);
    got(odd, n);
    CHECK(pwrite(out, cold(odd), n, 0) == (ssize_t)n);
    got(odd, n);
    CHECK(syscall(SYS_write, out, cold(odd), n) == (ssize_t)n);
    got(odd, n);
    cold(0);
    struct iovec v[3] = { { (void *)(map + odd), 5 << 20 }, { copy + odd + (5 << 20), 1 << 20 }, { (void *)(map + odd + (6 << 20)), 4 << 20 } };
    CHECK(writev(out, v, 3) == (ssize_t)n);
    got(odd, n);
    cold(0);
    CHECK(pwritev(out, v, 3, 0) == (ssize_t)n);
    got(odd, n);
    cold(0);
    CHECK(pwritev2(out, v, 3, 0, 0) == (ssize_t)n);
    got(odd, n);
    cold(0);
    CHECK(pwritev2(out, v, 3, -1, 0) == (ssize_t)n);
    got(odd, n);

    /* Across the end of the map: what is there is written, and no more. */
    CHECK(write(out, cold(len - PAGE), 2 * PAGE) == PAGE);
    got(len - PAGE, PAGE);

    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    expect(odd, n);
    CHECK(send(pair[0], cold(odd), n, 0) == (ssize_t)n);
    done();
    expect(odd, n);
    CHECK(sendto(pair[0], cold(odd), n, 0, NULL, 0) == (ssize_t)n);
    done();
    struct msghdr m = { .msg_iov = v, .msg_iovlen = 1 };
    v[0].iov_len = 3 << 20;
    expect(odd, 3 << 20);
    cold(0);
    CHECK(sendmsg(pair[0], &m, 0) == 3 << 20);
    done();
    struct mmsghdr mm[2] = { { .msg_hdr = m }, { .msg_hdr = m } };
    v[0].iov_len = 1 << 20;
    struct iovec second = { (void *)(map + odd + (1 << 20)), 1 << 20 };
    mm[1].msg_hdr.msg_iov = &second;
    expect(odd, 2 << 20);
    cold(0);
    CHECK(sendmmsg(pair[0], mm, 2, 0) == 2 && mm[1].msg_len == 1 << 20);
    done();
    int p[2];
    CHECK(pipe(p) == 0);
    v[0].iov_len = 20000;
    cold(0);
    CHECK(vmsplice(p[1], v, 1, 0) == 20000);
    CHECK(read(p[0], copy + len - n, 20000) == 20000 && memcmp(copy + len - n, copy + odd, 20000) == 0);
    CHECK(pread(fd, copy + len - n, n, len - n) == (ssize_t)n);

    FILE *f = fdopen(dup(out), "w");
    CHECK(fwrite(cold(odd), 1, n, f) == n && fflush(f) == 0);
    got(odd, n);
    CHECK(fwrite(cold(odd), 1 << 20, 10, f) == 10 && fflush(f) == 0);
    got(odd, n);
    /* Strings end at 64 KiB. */
    const size_t text = 65536 * 3 + 5, letters = 65536 - 5 - 1;
    CHECK(fputs(cold(text), f) >= 0 && fflush(f) == 0);
    got(text, letters);
    CHECK(fprintf(f, "%s", cold(text)) == (int)letters && fflush(f) == 0);
    got(text, letters);
    CHECK(fprintf(f, "%.*s", 100, cold(text)) == 100 && fflush(f) == 0);
    got(text, 100);
    CHECK(dprintf(out, "%s", cold(text)) == (int)letters);
    got(text, letters);
    fclose(f);
    fflush(stdout);
    int before = dup(1);
    dup2(out, 1);
    CHECK(printf("%s", cold(text)) == (int)letters && fflush(stdout) == 0);
    got(text, letters);
    CHECK(puts(cold(text)) >= 0 && fflush(stdout) == 0);
    char newline;
    CHECK(pread(out, &newline, 1, letters) == 1 && newline == '\n');
    CHECK(ftruncate(out, letters) == 0);
    got(text, letters);
    dup2(before, 1);

    /* Paths and addresses in a file. */
    char paths[2 * PAGE] = "";
    snprintf(path, sizeof path, "%s.paths", argv[1]);
    int pf = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    strcpy(paths, argv[1]);
    strcpy(paths + PAGE, ".");
    for (int i = 0; i < 256; i++)
        CHECK(write(pf, paths, sizeof paths) == sizeof paths);
    close(pf);
    const char *names = map_file(path, 0, 2 << 20);
#define NAME (absent(names, 2 << 20))
#define DIRECTORY (NAME + PAGE)
    struct stat st;
    struct statfs sf;
    char value[10], link[100];
    int a;
    CHECK((a = open(NAME, O_RDONLY)) >= 0 && close(a) == 0);
    CHECK((a = openat(AT_FDCWD, NAME, O_RDONLY)) >= 0 && close(a) == 0);
    CHECK(stat(NAME, &st) == 0 && st.st_size == (off_t)len);
    CHECK(lstat(NAME, &st) == 0 && st.st_size == (off_t)len);
    CHECK(fstatat(AT_FDCWD, NAME, &st, 0) == 0 && st.st_size == (off_t)len);
    CHECK(statfs(NAME, &sf) == 0);
    CHECK(access(NAME, R_OK) == 0);
    CHECK(faccessat(AT_FDCWD, NAME, R_OK, 0) == 0);
    CHECK(readlink(NAME, link, sizeof link) == -1 && errno == EINVAL);
    CHECK(getxattr(NAME, "user.none", value, sizeof value) == -1 && errno != EFAULT);
    CHECK(chmod(NAME, 0644) == 0);
    CHECK(mkdir(NAME, 0777) == -1 && errno == EEXIST);
    DIR *d = opendir(DIRECTORY);
    CHECK(d != NULL && closedir(d) == 0);
    FILE *g = fopen(NAME, "r");
    CHECK(g != NULL && fclose(g) == 0);
    CHECK(syscall(SYS_access, NAME, R_OK) == 0);
    /* What is no pointer at all is still refused. */
    char *volatile nowhere = (char *)16;
    CHECK(open(nowhere, O_RDONLY) == -1 && errno == EFAULT);
    CHECK(write(out, nowhere, 10) == -1 && errno == EFAULT);
    unlink(path);
    snprintf(path, sizeof path, "%s.out", argv[1]);
    unlink(path);
    printf("good\n");
    return 0;
}
