/* A process that knows who kept whom waiting.
 *
 *   convoy MODE ROUNDS FILE [SLOW]
 *
 * Thread `writer` maps and unmaps, thread `reader` touches cold pages of FILE; both measure each step. Thread `holder` does
 * what MODE says, ROUNDS times or until a second line comes: munmap (of 1 GiB), fork (with 1 GiB touched), fault (touches a
 * page of SLOW, whose second read gets no answer for a while), vma (changes a mapping of CONVOY_MIB, or 1 GiB, while thread `keeper` gives its pages
 * back: so it waits for the mapping's own lock while it has mmap_lock, which the keeper does not take), idle (nothing for a while:
 * somebody else reads this process's smaps). Prints "ready PID", waits for a line, and ends with a line of JSON: what the holder did when; each step of the
 * others in which the thread slept for over a millisecond; and of all its steps together how long they took (`wall`) and how
 * long it slept in them (`asleep`: neither running nor waiting for a processor). Times are nanoseconds of CLOCK_MONOTONIC.
 *
 * Nobody else takes this process's mmap_lock for long: the first thread sleeps, and huge pages, which the kernel's own thread
 * would look for, are off. So when `writer` and `reader` both sleep for it, `holder` has it (or, in mode idle, a neighbour).
 */
#include "check.h"
#include <stdatomic.h>
#include <sys/prctl.h>

#define GIB (1UL << 30)
#define LONG 1000000ULL /* a step that is told */
#define SHORT 20000ULL /* a step in which it may have slept */
#define STEPS_MAX 65536

typedef unsigned long long u64;

struct span {
	u64 from, to, asleep;
};
struct thread {
	const char *name;
	long tid;
	int schedstat;
	u64 began, ran, delayed;
	u64 wall, asleep;
	int count;
	struct span steps[STEPS_MAX];
};

static struct thread writer = { .name = "writer" }, reader = { .name = "reader" }, holder = { .name = "holder" };
static struct thread keeper = { .name = "keeper" };
static atomic_int stop, turn, begun, done; /* the last two: which turn the keeper has begun, and done */
static char *kept;
static unsigned long kept_len;
static const char *mode, *slow;
static int rounds, file;

static u64 now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static void begin(struct thread *t)
{
	t->tid = syscall(SYS_gettid);
	pthread_setname_np(pthread_self(), t->name);
	char path[64];
	snprintf(path, sizeof path, "/proc/self/task/%ld/schedstat", t->tid);
	t->schedstat = open(path, O_RDONLY);
	CHECK(t->schedstat >= 0);
}

/* How long this thread has waited for a processor, in all. */
static u64 delay(struct thread *t)
{
	char text[96] = "";
	u64 ran = 0, waited = 0;
	CHECK(pread(t->schedstat, text, sizeof text - 1, 0) > 0);
	CHECK(sscanf(text, "%llu %llu", &ran, &waited) == 2);
	return waited;
}

/* How long this thread has run, in all. */
static u64 ran(void)
{
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static void start(struct thread *t)
{
	t->delayed = delay(t);
	t->ran = ran();
	t->began = now();
}

static void end(struct thread *t, u64 least)
{
	u64 to = now(), took = to - t->began;
	t->wall += took;
	if (took < SHORT && least)
		return;
	/* Both are read outside the step, so the thread slept no less than this. */
	u64 elsewhere = ran() - t->ran + delay(t) - t->delayed, asleep = took > elsewhere ? took - elsewhere : 0;
	t->asleep += asleep;
	if (asleep < least)
		return;
	CHECK(t->count < STEPS_MAX);
	t->steps[t->count++] = (struct span){ t->began, to, asleep };
}

/* Whether the second line has come: then enough has been seen. */
static int is_enough(void)
{
	struct pollfd in = { .fd = 0, .events = POLLIN };
	return poll(&in, 1, 0) > 0 && in.revents & POLLIN;
}

static void *write_loop(void *unused)
{
	begin(&writer);
	while (!stop) {
		start(&writer);
		char *p = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		end(&writer, LONG);
		start(&writer);
		munmap(p, 16 * PAGE);
		end(&writer, LONG);
		usleep(500);
	}
	return unused;
}

static void *read_loop(void *unused)
{
	begin(&reader);
	off_t len = lseek(file, 0, SEEK_END);
	volatile char *p = mmap(NULL, len, PROT_READ, MAP_SHARED, file, 0);
	CHECK(p != MAP_FAILED);
	madvise((void *)p, len, MADV_RANDOM);
	unsigned long x = 1, pages = len / PAGE;
	while (!stop) {
		x = x * 6364136223846793005UL + 1442695040888963407UL;
		start(&reader);
		(void)p[(x >> 33) % pages * PAGE];
		end(&reader, LONG);
		usleep(200);
	}
	return unused;
}

static char *touched(unsigned long len)
{
	char *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(p != MAP_FAILED);
	madvise(p, len, MADV_NOHUGEPAGE);
	memset(p, 1, len);
	return p;
}

/* In each turn, gives the pages of a mapping back. */
static void *keep_loop(void *unused)
{
	begin(&keeper);
	for (; !stop; usleep(100)) {
		if (turn == done)
			continue;
		begun = turn;
		start(&keeper);
		CHECK(!madvise(kept, kept_len, MADV_DONTNEED));
		end(&keeper, 0);
		done = begun;
	}
	return unused;
}

/* Changes that mapping while the keeper is at it. */
static void change(int round)
{
	memset(kept, 1, kept_len);
	turn = round + 1;
	while (begun != turn)
		usleep(50);
	usleep(500);
	start(&holder);
	CHECK(!madvise(kept, kept_len, round % 2 ? MADV_DOFORK : MADV_DONTFORK));
	end(&holder, 0);
	while (done != turn)
		usleep(100);
}

static void *hold_loop(void *unused)
{
	begin(&holder);
	volatile char *pages = NULL;
	if (!strcmp(mode, "fault")) {
		int fd = open(slow, O_RDONLY);
		CHECK(fd >= 0);
		pages = mmap(NULL, rounds * 64 * PAGE, PROT_READ, MAP_SHARED, fd, 0);
		CHECK(pages != MAP_FAILED);
		madvise((void *)pages, rounds * 64 * PAGE, MADV_RANDOM);
	}
	for (int i = 0; i < rounds && !is_enough(); i++) {
		if (kept) {
			change(i);
			continue;
		}
		char *p = strcmp(mode, "munmap") ? NULL : touched(GIB);
		usleep(20000);
		start(&holder);
		if (p) {
			munmap(p, GIB);
		} else if (!strcmp(mode, "fork")) {
			pid_t child = fork();
			if (!child)
				_exit(0);
			end(&holder, 0);
			waitpid(child, NULL, 0);
			continue;
		} else if (pages) {
			(void)pages[i * 64 * PAGE];
		} else {
			usleep(200000);
		}
		end(&holder, 0);
	}
	return unused;
}

static void tell(struct thread *t, const char *end)
{
	printf("\"%s\": {\"tid\": %ld, \"wall\": %llu, \"asleep\": %llu, \"steps\": [", t->name, t->tid, t->wall, t->asleep);
	for (int i = 0; i < t->count; i++)
		printf("%s[%llu, %llu, %llu]", i ? ", " : "", t->steps[i].from, t->steps[i].to, t->steps[i].asleep);
	printf("]}%s", end);
}

int main(int argc, char **argv)
{
	CHECK(argc >= 4);
	CHECK(!prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	mode = argv[1];
	rounds = atoi(argv[2]);
	file = open(argv[3], O_RDONLY);
	CHECK(file >= 0);
	slow = argc > 4 ? argv[4] : NULL;
	posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
	char *rest = strcmp(mode, "fork") && strcmp(mode, "idle") ? NULL : touched(GIB);
	if (!strcmp(mode, "vma")) {
		const char *mib = getenv("CONVOY_MIB");
		kept_len = mib ? strtoul(mib, NULL, 10) << 20 : GIB;
		kept = touched(kept_len);
	}
	printf("ready %d\n", getpid());
	fflush(stdout);
	char line[16];
	CHECK(fgets(line, sizeof line, stdin));

	pthread_t w, r, h, k;
	CHECK(!pthread_create(&w, NULL, write_loop, NULL));
	CHECK(!pthread_create(&r, NULL, read_loop, NULL));
	if (kept)
		CHECK(!pthread_create(&k, NULL, keep_loop, NULL));
	CHECK(!pthread_create(&h, NULL, hold_loop, NULL));
	pthread_join(h, NULL);
	stop = 1;
	pthread_join(w, NULL);
	pthread_join(r, NULL);
	if (kept)
		pthread_join(k, NULL);
	printf("{");
	tell(&keeper, ", ");
	tell(&holder, ", ");
	tell(&writer, ", ");
	tell(&reader, "}\n");
	fflush(stdout);
	return rest ? rest[0] - 1 : 0;
}
