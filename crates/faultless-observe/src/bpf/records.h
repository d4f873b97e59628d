/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the BPF programs tell the observer: one structure for each kind of record in the ring, and the value of the map in
 * which faults are summed up. src/raw.rs has the same in Rust, and compares the sizes at compile time.
 *
 * Times are nanoseconds of CLOCK_MONOTONIC, durations nanoseconds.
 */
#ifndef FAULTLESS_RECORDS_H
#define FAULTLESS_RECORDS_H

/* Where time goes in which a thread gets no further, and that is not a wait for mmap_lock. */
enum cause {
	CAUSE_DEVICE, /* a read of the page that this thread has started */
	CAUSE_PAGE, /* a page that another thread has locked, most often to read it */
	CAUSE_LOCK, /* a sleeping lock other than mmap_lock */
	CAUSE_RECLAIM, /* direct reclaim of memory, running and asleep */
	CAUSE_CPU, /* could run, and no processor was free */
	CAUSE_OTHER, /* asleep for a reason that only the stack tells */
	CAUSES,
};

enum kind {
	KIND_FILE = 1,
	KIND_TASK,
	KIND_FAULT,
	KIND_WAIT,
	KIND_HOLD,
	KIND_STRAY,
	KIND_IO,
};

/* What a thread was doing in the kernel. */
enum doing {
	DOING_UNKNOWN,
	DOING_FAULT, /* a page fault of user code */
	DOING_SYSCALL,
	DOING_SYSCALL_FAULT, /* a system call that touched user memory */
	DOING_KERNEL_THREAD,
};

struct file_id {
	__u64 ino;
	__u32 dev; /* as the kernel has it: major << 20 | minor */
	__u32 pad;
};

struct header {
	__u8 kind;
	__u8 doing;
	__u16 syscall;
	__u32 tid;
	__u32 pid;
	__u32 target; /* the process whose mmap_lock it is */
};

#define PATH_PARTS 10
#define PART_LEN 64

struct record_file {
	struct header header;
	struct file_id file;
	__u32 parts; /* the file's own name first, then its directories' */
	__u32 magic;
	char part[PATH_PARTS][PART_LEN];
};

enum { TASK_FORK = 1, TASK_EXEC, TASK_EXIT, TASK_SEEN };
struct record_task {
	struct header header;
	__u64 at;
	__u32 what;
	__u32 parent;
	char comm[16];
};

enum {
	FAULT_MAJOR = 1,
	FAULT_GONE = 2, /* the page was read again under mmap_lock: it had gone since the first read */
	FAULT_LOCKED = 4, /* tried again (or tried at once) under mmap_lock */
	FAULT_WRITE = 8,
	FAULT_KERNEL = 16, /* touched by the kernel, for a system call */
	FAULT_OPEN = 32, /* still going on */
};
struct record_fault {
	struct header header;
	__u64 at;
	__u64 address;
	__u64 ip;
	struct file_id file;
	__u64 page; /* of the file */
	__u32 flags;
	__s32 stack;
	__u64 took; /* all of it */
	__u64 first; /* the attempt without mmap_lock, with its sleeps */
	__u64 wait; /* for mmap_lock */
	__u64 retry; /* under mmap_lock */
	__u64 retry_asleep; /* asleep under mmap_lock */
	__u64 cause[CAUSES];
};

enum {
	LOCK_WRITE = 1,
	LOCK_FAILED = 2, /* given up: a signal, or a try */
	LOCK_CONTENDED = 4, /* somebody was queued when it was let go */
	LOCK_DOWNGRADED = 8, /* this is the part after the downgrade */
	LOCK_DOWNGRADES = 16, /* this is the part before it */
	LOCK_OPEN = 32, /* still waiting, or still held */
	LOCK_TRY = 64,
};
struct record_wait {
	struct header header;
	__u64 mm;
	__u64 at;
	__u64 until;
	__u64 address; /* of the fault, or the system call's first argument */
	__u64 length; /* the system call's second argument */
	struct file_id file;
	__u64 page;
	__u32 flags;
	__u32 owner; /* the writer in the lock word when the wait began, 0 if there was none */
	__u64 cpu; /* could run, and no processor was free */
	__u64 granted; /* the last of that: woken because the lock is its own now, or free for it */
};

/* The thread that ended another one's sleep. */
struct waker {
	__u32 tid; /* 0: not known */
	__u32 pid;
	__u16 syscall;
	__u8 doing;
	__u8 pad;
	char comm[16];
	char name[24]; /* of the file that a read concerns */
	char parent[24]; /* and of its directory */
	__u32 more_pad;
};
struct record_hold {
	struct header header;
	__u64 mm;
	__u64 at;
	__u64 until;
	__u64 address;
	__u64 length;
	struct file_id file; /* of the page that it slept for, or of the descriptor that it reads */
	__u64 page;
	__u32 flags;
	__s32 stack; /* of its longest sleep */
	__u64 longest; /* sleep */
	__u64 cause[CAUSES];
	char name[24]; /* of the file that a read concerns */
	char parent[24]; /* and of its directory */
	struct waker waker; /* of its longest sleep */
};

/* A release without an acquisition, or the other way round. */
enum { STRAY_RELEASE = 1, STRAY_ACQUIRE, STRAY_SLOTS };
struct record_stray {
	struct header header;
	__u64 mm;
	__u64 at;
	__u32 what;
	__u32 flags;
};

enum { IO_FUSE = 1 };
struct record_io {
	struct header header;
	__u64 at;
	__u64 until;
	struct file_id file;
	__u64 page;
	__u32 bytes;
	__u32 flags;
};

/* Faults of a thread in a file, summed up. Only the thread itself writes it. */
struct tally_key {
	__u32 tid;
	__u32 pid;
	struct file_id file;
};
/* Buckets of fault durations: four to an octave, from 1 microsecond. */
#define BUCKETS 96
struct tally {
	__u64 faults; /* that took mmap_lock or slept */
	__u64 major;
	__u64 gone;
	__u64 total;
	__u64 longest;
	__u64 first;
	__u64 wait;
	__u64 retry;
	__u64 retry_asleep;
	__u64 cause[CAUSES];
	__s32 stack;
	__u32 pad;
	__u32 bucket[BUCKETS];
};

/* How to watch; fixed before the programs are loaded. */
struct settings {
	__u64 wait_ns; /* shorter waits for mmap_lock are summed up only */
	__u64 hold_ns; /* shorter holds that nobody waits for are not sent */
	__u64 fault_ns; /* faults that waited that long for mmap_lock are sent singly */
	__u8 every_fault; /* send each fault, each write hold and each read of a file singly */
	__u8 follow_children;
	__u8 pad[6];
};

/* Values of the map of processes. */
enum { TARGET_WATCHED = 1, TARGET_CHILDREN = 2 /* not itself, but what it forks */ };

/* What could not be told. */
struct losses {
	__u64 ring; /* records for which the ring had no room */
	__u64 tallies; /* faults that found no room in the map of sums */
	__u64 threads; /* events of threads for which no state could be had */
	__u64 targets; /* forked processes that found no room in the map of processes */
	__u64 names; /* files whose name could not be told */
	__u64 slots; /* locks held beyond those that are followed for a thread */
};

#endif
