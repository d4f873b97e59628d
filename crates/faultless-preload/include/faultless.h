/*
 * Faultless: files as memory whose misses never take mmap_lock, for programs in C.
 *
 *     cc -o search search.c -lfaultless_preload
 *
 * A pool has a memory budget, shared by any number of maps. A map is read-only memory that is read as it is touched: in the
 * thread that touches it, without a lock of the kernel's memory management. Maps come with a read lease, so that their
 * bytes never change; with FAULTLESS_TRUSTED you vouch for that yourself.
 *
 * Functions return 0, or -1: then faultless_error() says why, in words, until this thread's next call. (In a destructor of
 * thread-specific data, where the words are gone already, it returns "".) All may be called by
 * any thread at any time; a handle must not be closed while another thread uses it. A forked child cannot use its parent's
 * handles. Do not block SIGBUS in a thread that reads maps; install a SIGBUS handler of your own before the first pool.
 *
 * A system call that is handed a pointer to a page that is not in memory fails with EFAULT: pin the range first. (In a
 * program that is linked with this library, or runs under `faultless run`, the C library's functions still know nothing of
 * maps made here.)
 */
#ifndef FAULTLESS_H
#define FAULTLESS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A memory budget. */
typedef struct faultless_pool faultless_pool;
/* A file as memory. */
typedef struct faultless_map faultless_map;
/* A part of a map that is in memory and stays there. */
typedef struct faultless_pin faultless_pin;

/* Why the calling thread's last call failed; "" if it did not. */
const char *faultless_error(void);

/* Makes a pool with a budget in bytes (at least 1 MiB); 0: half of the memory that is available now. */
int faultless_pool_open(uint64_t memory, faultless_pool **pool);
/* Changes the budget. A smaller one is reached by eviction, soon after. */
int faultless_pool_resize(faultless_pool *pool, uint64_t memory);
/* What serves misses: "full", "partial (why)" or "mmap (why)". Valid until the pool is closed. */
const char *faultless_pool_backend(const faultless_pool *pool);
/* Closes the handle; the pool lives on until its last map is closed. NULL is ignored. */
void faultless_pool_close(faultless_pool *pool);

/* Flags of maps. */
#define FAULTLESS_TRUSTED 1u  /* no lease: you vouch that the bytes do not change while the map lives */
#define FAULTLESS_BUFFERED 2u /* read through the page cache (default: directly where the file system can) */
#define FAULTLESS_RANDOM 4u   /* it will be read here and there: nothing is read ahead */
#define FAULTLESS_SEQUENTIAL 8u /* it will be read in order */

/* Maps a whole, regular file. */
int faultless_map_open(faultless_pool *pool, const char *path, unsigned flags, faultless_map **map);
/* Maps len bytes (0: all that there are) of an open file from an offset, which can be any. The descriptor is not kept.
 * As with mmap, a map may reach beyond the end of the file: touching a page that lies wholly beyond it raises SIGBUS, and a pin of
 * it is an error. */
int faultless_map_fd(faultless_pool *pool, int fd, uint64_t offset, size_t len, unsigned flags, faultless_map **map);
/* The bytes: valid until the map is closed. */
const void *faultless_map_data(const faultless_map *map);
size_t faultless_map_len(const faultless_map *map);
/* Unmaps. Pins of it must have been dropped. NULL is ignored. */
void faultless_map_close(faultless_map *map);

/* Makes a range resident: a miss costs no fault and no signal, and a read error is an error here. It pins nothing: if a page is
 * evicted before it is touched, the touch is served as any other. */
int faultless_load(faultless_map *map, size_t offset, size_t len);

/* A part of a map, in bytes. */
struct faultless_range {
    size_t offset;
    size_t len;
};

/* Loads count ranges, with many reads in flight. failed: NULL, or room for a byte for each range, which is set to 1 if the range
 * could not be loaded, and to 0 if it was. -1 if any failed: then faultless_error() is about the first. */
int faultless_load_many(faultless_map *map, const struct faultless_range *ranges, size_t count, unsigned char *failed);

/* Makes a range resident, and keeps it so until faultless_unpin: it can then be handed to system calls, and a read error is
 * an error here, not SIGBUS later. */
int faultless_pin_range(faultless_map *map, size_t offset, size_t len, faultless_pin **pin);
/* The same for count ranges, with many reads in flight. pins: room for a pointer for each range; NULL where a range could not be
 * pinned. -1 if any failed: then faultless_error() is about the first, and the pins of the others are the caller's all the same. */
int faultless_pin_many(faultless_map *map, const struct faultless_range *ranges, size_t count, faultless_pin **pins);
/* NULL is ignored. */
void faultless_unpin(faultless_pin *pin);
/* Writes a range to a file, a pipe or a socket, all of it, piece by piece. What was written before an error stays written; a
 * descriptor that does not block is an error when it would. */
int faultless_write_to(faultless_map *map, int fd, size_t offset, size_t len);
/* Asks for a range to be read soon; returns at once. */
int faultless_prefetch(faultless_map *map, size_t offset, size_t len);
/* Gives the memory of a range back now. It is read again when touched. */
int faultless_release(faultless_map *map, size_t offset, size_t len);
/* 1: the whole range is in memory, as far as is known; 0: not. */
int faultless_is_resident(const faultless_map *map, size_t offset, size_t len);

/* What happened, since the beginning. Later versions add fields at the end. */
struct faultless_stats {
    uint64_t misses;          /* touches of absent pages */
    uint64_t fills;           /* pages read and installed */
    uint64_t bytes_read;      /* bytes read from files */
    uint64_t evictions;       /* pages given up */
    uint64_t errors;          /* fills that failed */
    uint64_t memory;          /* the budget, in bytes (pools only) */
    uint64_t used;            /* what is used of it (pools only) */
    uint64_t peak;            /* the most that was used (pools only) */
    uint64_t fill_p50_ns;     /* time of a fill: median */
    uint64_t fill_p99_ns;     /* time of a fill: 99th percentile */
};

/* Fill the first size bytes of stats: pass sizeof(struct faultless_stats). */
int faultless_pool_stats(const faultless_pool *pool, struct faultless_stats *stats, size_t size);
int faultless_map_stats(const faultless_map *map, struct faultless_stats *stats, size_t size);

#ifdef __cplusplus
}
#endif

#endif
