/* Threads that queue up for mmap_lock behind a reader that keeps it.
 *
 *   queue SLOW PATTERN…
 *
 * For each PATTERN, such as rwwr: thread `holder` touches a page of SLOW, whose first read fails; the second one is made under
 * mmap_lock (for reading), and gets no answer for a while. One thread for each letter comes for the lock, in that order: r
 * calls mincore (reading), w calls mmap (writing). Each comes when the one before it has had the lock, or sleeps for it.
 *
 * Prints "ready PID" and waits for a line. In each scene it prints "scene N" when the holder is on its way, and waits for a
 * line, which says that the holder's second read has come; and it prints "queued" when all sleep that have to, and then the
 * read may be answered. Ends with a line of JSON: for each pattern the threads, the holder first, each with its number, the
 * time when it was let go for the lock, and the time when it was seen asleep for it (0: it was not). Times are nanoseconds of
 * CLOCK_MONOTONIC.
 *
 * While the holder keeps the lock, the first thread must not need it: all of its pages are in memory and stay there, and the
 * threads that come are made before. Nor must those that have had the lock need it again, as a thread does that ends.
 */
#include "check.h"
#include <semaphore.h>
#include <stdatomic.h>

#define SCENES_MAX 16
#define COMERS_MAX 32

typedef unsigned long long u64;

struct comer {
	char what;
	atomic_long tid;
	void *page;
	sem_t go;
	atomic_int done;
	u64 came, seen;
	pthread_t thread;
};

static struct comer all[SCENES_MAX][1 + COMERS_MAX];
static int wchans[1 + COMERS_MAX];
static sem_t leave;

static u64 now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static void take(char what, void *page)
{
	unsigned char in_memory;
	if (what == 'r')
		CHECK(!mincore(page, PAGE, &in_memory));
	else
		CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
}

static void *come(void *arg)
{
	struct comer *c = arg;
	c->tid = syscall(SYS_gettid);
	CHECK(!sem_wait(&c->go));
	take(c->what, c->page);
	c->done = 1;
	CHECK(!sem_wait(&leave));
	return NULL;
}

static void *hold(void *arg)
{
	struct comer *c = arg;
	c->tid = syscall(SYS_gettid);
	(void)*(volatile char *)c->page;
	c->done = 1;
	CHECK(!sem_wait(&leave));
	return NULL;
}

/* Waits until a thread has had the lock, or sleeps for it in the call that it came for. */
static void await(struct comer *c, int wchan)
{
	static char text[64];
	while (!c->done) {
		ssize_t n = pread(wchan, text, sizeof text - 1, 0);
		CHECK(n >= 0);
		text[n] = 0;
		if (strstr(text, c->what == 'r' ? "mincore" : "mmap")) {
			c->seen = now();
			return;
		}
		usleep(200);
	}
}

int main(int argc, char **argv)
{
	CHECK(argc > 2);
	int scenes = argc - 2, fd = open(argv[1], O_RDONLY);
	CHECK(fd >= 0 && scenes <= SCENES_MAX);
	char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(page != MAP_FAILED);
	printf("ready %d\n", getpid());
	fflush(stdout);
	char line[16];
	CHECK(fgets(line, sizeof line, stdin));
	/* Symbols are bound at the first call. */
	take('r', page);
	take('w', page);
	sem_init(&leave, 0, 0);
	CHECK(!mlockall(MCL_CURRENT));
	char *slow = mmap(NULL, scenes * 64 * PAGE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(slow != MAP_FAILED);
	CHECK(!madvise(slow, scenes * 64 * PAGE, MADV_RANDOM));
	for (int s = 0; s < scenes; s++) {
		const char *pattern = argv[2 + s];
		struct comer *c = all[s];
		int n = strlen(pattern);
		CHECK(n <= COMERS_MAX);
		for (int i = 1; i <= n; i++) {
			c[i].what = pattern[i - 1];
			c[i].page = page;
			sem_init(&c[i].go, 0, 0);
			CHECK(!pthread_create(&c[i].thread, NULL, come, &c[i]));
		}
		for (int i = 1; i <= n; i++) {
			char path[64];
			while (!c[i].tid)
				usleep(200);
			snprintf(path, sizeof path, "/proc/self/task/%ld/wchan", (long)c[i].tid);
			wchans[i] = open(path, O_RDONLY);
			CHECK(wchans[i] >= 0);
		}
		c[0].page = slow + s * 64 * PAGE;
		CHECK(!pthread_create(&c[0].thread, NULL, hold, &c[0]));
		printf("scene %d\n", s);
		fflush(stdout);
		CHECK(fgets(line, sizeof line, stdin));
		for (int i = 1; i <= n; i++) {
			c[i].came = now();
			CHECK(!sem_post(&c[i].go));
			await(&c[i], wchans[i]);
		}
		/* So that each of them waits for five milliseconds at least. */
		usleep(5000);
		printf("queued\n");
		fflush(stdout);
		for (int i = 0; i <= n; i++)
			while (!c[i].done)
				usleep(200);
		for (int i = 0; i <= n; i++)
			CHECK(!sem_post(&leave));
		for (int i = 0; i <= n; i++) {
			CHECK(!pthread_join(c[i].thread, NULL));
			if (i)
				close(wchans[i]);
		}
	}
	printf("[");
	for (int s = 0; s < scenes; s++) {
		printf("%s[", s ? ", " : "");
		for (int i = 0; i <= (int)strlen(argv[2 + s]); i++) {
			struct comer *c = &all[s][i];
			printf("%s[%ld, %llu, %llu]", i ? ", " : "", (long)c->tid, c->came, c->seen);
		}
		printf("]");
	}
	printf("]\n");
	return 0;
}
