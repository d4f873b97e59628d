/* Threads that queue up for mmap_lock behind a reader that keeps it.
 *
 *   queue SLOW DELAY_MS PATTERN…
 *
 * For each PATTERN, such as rwwr: thread `holder` touches a page of SLOW, whose first read fails and whose second takes DELAY_MS;
 * that one is made under mmap_lock (for reading). While that goes on, one thread for each letter comes for the
 * lock, in that order: r calls mincore (reading), w calls mmap (writing). Prints "ready PID", waits for a line, and ends with
 * a line of JSON: for each pattern the thread numbers, the holder's first.
 */
#include "check.h"

#define APART_US 10000

struct comer {
	char what;
	long tid;
	unsigned long after_us;
	void *page;
};

static void *come(void *arg)
{
	struct comer *c = arg;
	unsigned char in_memory;
	c->tid = syscall(SYS_gettid);
	usleep(c->after_us);
	if (c->what == 'r')
		mincore(c->page, PAGE, &in_memory);
	else
		mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return NULL;
}

static void *hold(void *arg)
{
	struct comer *c = arg;
	c->tid = syscall(SYS_gettid);
	(void)*(volatile char *)c->page;
	return NULL;
}

int main(int argc, char **argv)
{
	CHECK(argc > 3);
	unsigned long delay_us = strtoul(argv[2], NULL, 10) * 1000;
	int scenes = argc - 3, fd = open(argv[1], O_RDONLY);
	CHECK(fd >= 0);
	char *slow = mmap(NULL, scenes * 64 * PAGE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(slow != MAP_FAILED);
	madvise(slow, scenes * 64 * PAGE, MADV_RANDOM);
	char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(page != MAP_FAILED);
	printf("ready %d\n", getpid());
	fflush(stdout);
	char line[16];
	CHECK(fgets(line, sizeof line, stdin));
	printf("[");
	for (int s = 0; s < scenes; s++) {
		const char *pattern = argv[3 + s];
		int n = strlen(pattern);
		struct comer all[33] = { { .what = 'h', .page = slow + s * 64 * PAGE } };
		pthread_t threads[33];
		CHECK(n <= 32);
		for (int i = 1; i <= n; i++) {
			/* The first read fails at once. */
			all[i] = (struct comer){ pattern[i - 1], 0, delay_us / 4 + i * APART_US, page };
			CHECK(!pthread_create(&threads[i], NULL, come, &all[i]));
		}
		CHECK(!pthread_create(&threads[0], NULL, hold, &all[0]));
		for (int i = 0; i <= n; i++)
			CHECK(!pthread_join(threads[i], NULL));
		printf("%s[", s ? ", " : "");
		for (int i = 0; i <= n; i++)
			printf("%s%ld", i ? ", " : "", all[i].tid);
		printf("]");
	}
	printf("]\n");
	return 0;
}
