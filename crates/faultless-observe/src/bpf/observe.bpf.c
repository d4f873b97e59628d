/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The observer's part in the kernel.
 *
 * Every thread that faults in a watched process, or that takes the mmap_lock of one, has a state in task storage: the
 * fault that it is in, the lock that it waits for, the locks that it holds, and since when it is off the processor and
 * why. Events of the scheduler charge the time asleep to whatever is open then. What ends is
 *
 *   - summed up by thread and file (a fault), or
 *   - sent to the ring singly, when it was long or when others waited for it (a wait, a hold), or always (every_fault).
 *
 * Only the thread itself writes its state, on the processor that runs it (and who wakes it, while it is off), so nothing
 * here is atomic but what is counted over all threads. Who waited behind whom is found later, by the reader of the ring: a hold is sent before the lock is
 * let go, so it comes before the wait that it ended.
 *
 * The bounds are those of the tracepoints: `released` fires just before the lock word changes, `acquire_returned` just
 * after it.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "records.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

const volatile struct settings settings SEC(".rodata.settings") = {};

/* When the observation ended: what was known then stays as it is. 0: it goes on. */
volatile __u64 over SEC(".data.over") = 0;

struct losses losses = {};

/* Processes whose faults and whose mmap_lock are watched. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u8);
} targets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 << 20);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct tally_key);
	__type(value, struct tally);
} tallies SEC(".maps");

/* Files whose name has been sent. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct file_id);
	__type(value, __u8);
} files SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_STACK_TRACE);
	__uint(max_entries, 16384);
	__uint(key_size, 4);
	__uint(value_size, 24 * 8);
} stacks SEC(".maps");

/* Requests to FUSE servers that are on their way. */
struct fuse_sent {
	__u64 at;
	__u64 unique;
	__u64 page;
	struct file_id file;
	struct header header;
};
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, struct fuse_sent);
} fuse_requests SEC(".maps");

/* Pages that watched threads have put into the page cache, to be read: what they read is told, and nothing else. */
struct page_key {
	__u64 mapping;
	__u64 index;
};
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct page_key);
	__type(value, __u8);
} pages SEC(".maps");

#define HOLDS 2 /* locks of watched processes that one thread holds at a time */
#define NO_STACK -1

struct hold {
	__u64 mm; /* 0: free */
	__u64 at;
	__u64 address;
	__u64 length;
	__u64 longest;
	__u64 cause[CAUSES];
	__u32 target;
	__u32 flags;
	__s32 stack;
	__u16 syscall;
	__u8 doing;
	__u8 slept_for_file;
	struct file_id file;
	__u64 page;
	struct waker waker; /* of the longest sleep */
};

struct thread {
	/* The fault that it is in; 0 is none. */
	__u64 fault_at;
	__u64 address;
	__u64 ip;
	__u64 user_ip; /* where the thread entered the kernel, and by which call (-1: by an exception) */
	__u64 user_call;
	__u64 major_before;
	__u64 faults_before;
	__u64 wait_since;
	__u64 waited;
	__u64 first;
	__u64 retry_at;
	__u64 retry_asleep;
	__u64 cause[CAUSES];
	__u32 fault_flags;
	__s32 stack;

	/* The page of a file that is being looked for. */
	struct file_id file;
	__u64 page;
	__u64 mapping;
	__u64 in_lock; /* the sleeping lock, other than mmap_lock, that it waits for */
	__u8 looking; /* 0, or a cause: CAUSE_PAGE + 1, CAUSE_DEVICE + 1 */
	__u8 tried; /* the page has been looked for in an attempt before this one */
	__u8 told; /* it has held others up */
	__u8 is_target;
	__u8 off_why;
	__s32 off_stack;

	/* The wait for a watched mmap_lock; mm 0 is none. */
	__u64 wait_mm;
	__u64 wait_cpu;
	__u64 wait_granted;
	__u32 wait_flags;
	__u32 wait_owner;
	__u32 wait_target;

	struct hold holds[HOLDS];

	__u64 off_at; /* off the processor since; 0: on it */
	__u64 woken_at;
	struct waker waker; /* of this sleep */
	__u64 on_at;
	__u64 reclaim_at;
};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct thread);
} threads SEC(".maps");

/* ---- What is common ---- */

static __always_inline struct thread *known(struct task_struct *task)
{
	return over ? NULL : bpf_task_storage_get(&threads, task, 0, 0);
}

static __always_inline void *reserve(__u64 size)
{
	void *record = bpf_ringbuf_reserve(&ring, size, 0);
	if (!record)
		__sync_fetch_and_add(&losses.ring, 1);
	return record;
}

/* The reader looks by itself many times a second; it is woken only when the ring fills up before. */
static __always_inline void submit(void *record)
{
	__u64 full = bpf_ringbuf_query(&ring, BPF_RB_AVAIL_DATA);
	bpf_ringbuf_submit(record, full > (4 << 20) ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

static __always_inline void fill_header(struct header *header, __u8 kind, struct task_struct *task, __u32 target)
{
	header->kind = kind;
	header->doing = DOING_UNKNOWN;
	header->syscall = 0;
	header->tid = task->pid;
	header->pid = task->tgid;
	header->target = target;
}

static __always_inline int tell_name(struct task_struct *task, const char *name, __u32 what, __u32 parent)
{
	struct record_task *record = reserve(sizeof(*record));
	if (!record)
		return 0;
	fill_header(&record->header, KIND_TASK, task, 0);
	record->at = bpf_ktime_get_ns();
	record->what = what;
	record->parent = parent;
	bpf_probe_read_kernel_str(record->comm, sizeof(record->comm), name);
	submit(record);
	return 0;
}

static __noinline int tell_task(struct task_struct *task, __u32 what, __u32 parent)
{
	return task ? tell_name(task, task->comm, what, parent) : 0;
}

static __always_inline bool is_target(__u32 pid)
{
	__u8 *how = bpf_map_lookup_elem(&targets, &pid);
	return !over && how && *how == TARGET_WATCHED;
}

/* The current thread's state, made when it has none. */
static __always_inline struct thread *made(struct task_struct *task)
{
	if (over)
		return NULL;
	struct thread *t = bpf_task_storage_get(&threads, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!t) {
		__sync_fetch_and_add(&losses.threads, 1);
		return NULL;
	}
	if (!t->on_at) {
		t->on_at = bpf_ktime_get_ns();
		t->is_target = is_target(task->tgid);
		tell_task(task, TASK_SEEN, 0);
	}
	return t;
}

/* The watched process whose memory this is, or 0. */
static __always_inline __u32 watched(struct mm_struct *mm)
{
	struct task_struct *owner = mm->owner;
	/* A fork's new mm has a child as its owner that is not yet a process of its own. */
	if (!owner || owner->mm != mm)
		return 0;
	__u32 pid = owner->tgid;
	return is_target(pid) ? pid : 0;
}

static __always_inline bool is_contended(struct mm_struct *mm)
{
	/* RWSEM_FLAG_WAITERS, or somebody who spins for it. */
	if (mm->mmap_lock.count.counter & 2)
		return true;
	return bpf_core_field_exists(mm->mmap_lock.osq) && mm->mmap_lock.osq.tail.counter;
}

/* Whether the fault that was seen last is the one in which the thread entered the kernel now. */
static __always_inline bool in_fault(struct thread *t, struct task_struct *task)
{
	if (!t->fault_at)
		return false;
	/* The kernel counts a fault when it has been served, and not when it is to be tried again. */
	if (task->maj_flt + task->min_flt != t->faults_before)
		return false;
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);
	return regs->ip == t->user_ip && regs->orig_ax == t->user_call;
}

/*
 * Whether the thread is in the exception in which it faulted. The kernel may have served the fault and counted it, but still hold the VMA's
 * lock. (In a system call, the fault may have been over for long.)
 */
static __always_inline bool leaves_fault(struct thread *t, struct task_struct *task)
{
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);
	return t->fault_at && (long)regs->orig_ax < 0 && regs->orig_ax == t->user_call && regs->ip == t->user_ip;
}

/* When a fault ended whose end was not seen: not before the last thing that is known of it. */
static __always_inline __u64 fault_end(struct thread *t)
{
	__u64 end = t->on_at > t->fault_at ? t->on_at : t->fault_at;
	return end > t->retry_at ? end : t->retry_at;
}

/* What the thread does in the kernel, for a lock that it takes. */
struct deed {
	__u64 address;
	__u64 length;
	__u16 syscall;
	__u8 doing;
};
#define PF_KTHREAD 0x00200000
/* `fault`: the state of a thread that is in a fault; NULL for others. */
static __always_inline void find_deed(struct deed *deed, const struct thread *fault, struct task_struct *task)
{
	deed->address = deed->length = 0;
	deed->syscall = 0;
	if (task->flags & PF_KTHREAD) {
		deed->doing = DOING_KERNEL_THREAD;
		return;
	}
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);
	long call = regs->orig_ax;
	if (fault)
		deed->address = fault->address;
	if (call < 0) {
		deed->doing = fault ? DOING_FAULT : DOING_UNKNOWN;
		return;
	}
	deed->syscall = call;
	if (fault) {
		deed->doing = DOING_SYSCALL_FAULT;
		return;
	}
	deed->doing = DOING_SYSCALL;
	deed->address = regs->di;
	deed->length = regs->si;
}

static __always_inline void tell_deed(struct header *header, const struct deed *deed)
{
	header->doing = deed->doing;
	header->syscall = deed->syscall;
}

/* Tells a file's name, once. The mapping may be another one's by now: then it is not the file that was meant. */
static __noinline int tell_file(struct address_space *mapping, __u64 meant)
{
	struct file_id id = {};
	struct inode *inode = BPF_CORE_READ(mapping, host);
	if (!inode)
		return 0;
	id.ino = BPF_CORE_READ(inode, i_ino);
	id.dev = BPF_CORE_READ(inode, i_sb, s_dev);
	if (id.ino != meant)
		return 0;
	__u8 one = 1;
	long error = bpf_map_update_elem(&files, &id, &one, BPF_NOEXIST);
	if (error) {
		if (error != -17 /* EEXIST */)
			__sync_fetch_and_add(&losses.names, 1);
		return 0;
	}
	struct record_file *record = reserve(sizeof(*record));
	if (!record) {
		bpf_map_delete_elem(&files, &id);
		return 0;
	}
	struct task_struct *task = bpf_get_current_task_btf();
	fill_header(&record->header, KIND_FILE, task, 0);
	record->file = id;
	record->magic = BPF_CORE_READ(inode, i_sb, s_magic);
	record->parts = 0;
	struct hlist_node *alias = BPF_CORE_READ(inode, i_dentry.first);
	if (alias) {
		__u32 at;
		if (bpf_core_field_exists(struct dentry, d_alias))
			at = bpf_core_field_offset(struct dentry, d_alias);
		else
			at = bpf_core_field_offset(struct dentry___before_7_1, d_u.d_alias);
		struct dentry *dentry = (void *)alias - at;
		for (int i = 0; i < PATH_PARTS; i++) {
			struct dentry *parent = BPF_CORE_READ(dentry, d_parent);
			if (parent == dentry)
				break;
			bpf_probe_read_kernel_str(record->part[i], PART_LEN, BPF_CORE_READ(dentry, d_name.name));
			record->parts = i + 1;
			dentry = parent;
		}
	}
	submit(record);
	return 0;
}

/* Tail pages have bit 0 set, and the address of the head page or (Linux 7.3, not 6.18) a mask that makes it of their own. */
static __always_inline struct folio *folio_of(struct page *page)
{
	unsigned long info;
	if (bpf_core_field_exists(struct page, compound_info))
		info = BPF_CORE_READ(page, compound_info);
	else
		info = BPF_CORE_READ((struct page___with_head *)page, compound_head);
	if (!(info & 1))
		return (struct folio *)page;
	/* (No page structure lies in the last 2 GiB of addresses, and no mask leaves so many bits out.) */
	if (info >> 31 == ~0UL >> 31)
		return (struct folio *)((unsigned long)page & (info - 1));
	return (struct folio *)(info - 1);
}

static __always_inline __u32 bucket_of(__u64 ns)
{
	__u64 quarters = ns >> 8, v = quarters;
	__u32 log = 0;
	if (v < 4)
		return 0;
	if (v >> 32) { log += 32; v >>= 32; }
	if (v >> 16) { log += 16; v >>= 16; }
	if (v >> 8) { log += 8; v >>= 8; }
	if (v >> 4) { log += 4; v >>= 4; }
	if (v >> 2) { log += 2; v >>= 2; }
	if (v >> 1) log += 1;
	__u32 bucket = (log - 2) * 4 + ((quarters >> (log - 2)) & 3);
	return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

/* ---- Faults ---- */

/* Faults that neither slept nor took the lock are nobody's stall, and leave no trace. */
static __always_inline void finish_fault(struct thread *t, struct task_struct *task, __u64 now)
{
	__u64 at = t->fault_at;
	if (!at)
		return;
	if (now < at)
		now = at;
	t->fault_at = 0;
	t->looking = 0;
	__u64 stalled = 0;
	for (int i = 0; i < CAUSES; i++)
		if (i != CAUSE_CPU)
			stalled |= t->cause[i];
	if (!(t->fault_flags & FAULT_LOCKED) && !stalled)
		return;
	if (task->maj_flt != t->major_before)
		t->fault_flags |= FAULT_MAJOR;

	struct tally_key key = {};
	key.tid = task->pid;
	key.pid = task->tgid;
	key.file = t->file;
	struct tally *sum = bpf_map_lookup_elem(&tallies, &key);
	if (!sum) {
		static const struct tally empty = {};
		bpf_map_update_elem(&tallies, &key, &empty, BPF_NOEXIST);
		sum = bpf_map_lookup_elem(&tallies, &key);
		if (t->mapping)
			tell_file((struct address_space *)t->mapping, t->file.ino);
	}
	if (!sum) {
		/* There is no room for another row: the processor's own counts for it. */
		struct tally_key rest = {};
		rest.tid = bpf_get_smp_processor_id();
		sum = bpf_map_lookup_elem(&tallies, &rest);
		if (!sum)
			__sync_fetch_and_add(&losses.tallies, 1);
	}
	__u64 retry = t->retry_at && now > t->retry_at ? now - t->retry_at : 0;
	__u64 first = t->fault_flags & FAULT_LOCKED ? t->first : now - at;
	if (sum) {
		sum->faults++;
		if (t->fault_flags & FAULT_MAJOR)
			sum->major++;
		if (t->fault_flags & FAULT_GONE)
			sum->gone++;
		sum->total += now - at;
		if (now - at > sum->longest)
			sum->longest = now - at;
		sum->first += first;
		sum->wait += t->waited;
		sum->retry += retry;
		sum->retry_asleep += t->retry_asleep;
		for (int i = 0; i < CAUSES; i++)
			sum->cause[i] += t->cause[i];
		if (t->stack >= 0)
			sum->stack = t->stack + 1;
		__u32 bucket = bucket_of(now - at);
		if (bucket < BUCKETS)
			sum->bucket[bucket]++;
	}
	if (settings.every_fault || t->waited >= settings.fault_ns) {
		struct record_fault *record = reserve(sizeof(*record));
		if (!record)
			return;
		fill_header(&record->header, KIND_FAULT, task, task->tgid);
		record->header.doing = t->fault_flags & FAULT_KERNEL ? DOING_SYSCALL_FAULT : DOING_FAULT;
		record->at = at;
		record->address = t->address;
		record->ip = t->ip;
		record->file = t->file;
		record->page = t->page;
		record->flags = t->fault_flags;
		record->stack = t->stack;
		record->took = now - at;
		record->first = first;
		record->wait = t->waited;
		record->retry = retry;
		record->retry_asleep = t->retry_asleep;
		for (int i = 0; i < CAUSES; i++)
			record->cause[i] = t->cause[i];
		submit(record);
	}
}

static __always_inline int begin_fault(unsigned long address, unsigned long ip, unsigned long error, __u32 flags)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct thread *t = known(task);
	if (!t) {
		if (!is_target(task->tgid))
			return 0;
		t = made(task);
	}
	if (!t || !t->is_target)
		return 0;
	if (t->fault_at)
		finish_fault(t, task, fault_end(t));
	struct pt_regs *user = (struct pt_regs *)bpf_task_pt_regs(task);
	t->fault_at = bpf_ktime_get_ns();
	t->address = address;
	t->ip = ip;
	t->user_ip = user->ip;
	t->user_call = user->orig_ax;
	t->major_before = task->maj_flt;
	t->faults_before = task->maj_flt + task->min_flt;
	t->tried = 0;
	t->waited = 0;
	t->first = 0;
	t->retry_at = 0;
	t->retry_asleep = 0;
	for (int i = 0; i < CAUSES; i++)
		t->cause[i] = 0;
	t->fault_flags = flags | (error & 2 ? FAULT_WRITE : 0);
	t->stack = NO_STACK;
	t->file.ino = 0;
	t->file.dev = 0;
	t->page = 0;
	t->mapping = 0;
	t->looking = 0;
	return 0;
}

SEC("tp_btf/page_fault_user")
int BPF_PROG(page_fault_user, unsigned long address, struct pt_regs *regs, unsigned long error)
{
	return begin_fault(address, regs->ip, error, 0);
}

SEC("tp_btf/page_fault_kernel")
int BPF_PROG(page_fault_kernel, unsigned long address, struct pt_regs *regs, unsigned long error)
{
	/* One that may not sleep takes no lock and fails; one on the kernel's own memory is none of ours. */
	struct task_struct *task = bpf_get_current_task_btf();
	if (address >> 56 || task->pagefault_disabled)
		return 0;
	return begin_fault(address, regs->ip, error, FAULT_KERNEL);
}

/* ---- The page cache ---- */

static __always_inline void look_for(struct thread *t, struct address_space *mapping, unsigned long index)
{
	struct inode *inode = mapping->host;
	t->mapping = (__u64)mapping;
	t->file.ino = inode->i_ino;
	t->file.dev = inode->i_sb->s_dev;
	t->page = index;
	t->looking = CAUSE_PAGE + 1;
}

/* Whether the thread is in a fault, or holds a watched lock. A fault that is over is finished. */
static __always_inline bool is_busy(struct thread *t, struct task_struct *task)
{
	if (t->fault_at && !in_fault(t, task))
		finish_fault(t, task, fault_end(t));
	return t->fault_at || t->holds[0].mm || t->holds[1].mm;
}

SEC("tp_btf/mm_filemap_fault")
int BPF_PROG(filemap_fault, struct address_space *mapping, unsigned long index)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct thread *t = known(task);
	if (t && is_busy(t, task))
		look_for(t, mapping, index);
	return 0;
}

SEC("tp_btf/mm_filemap_add_to_page_cache")
int BPF_PROG(filemap_add, struct folio *folio)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct thread *t = known(task);
	if (!t || !is_busy(t, task))
		return 0;
	unsigned long index = folio->index;
	if (!t->looking) /* a kernel without mm_filemap_fault */
		look_for(t, folio->mapping, index);
	/* The folio that holds the page, or one of the window that is read with it: 2 MiB is the largest folio. */
	if ((__u64)folio->mapping == t->mapping && index <= t->page && t->page - index < 512) {
		t->looking = CAUSE_DEVICE + 1;
		if (t->retry_at && t->tried)
			t->fault_flags |= FAULT_GONE;
	}
	if (settings.every_fault) {
		struct page_key key = { .mapping = (__u64)folio->mapping, .index = index };
		__u8 one = 1;
		bpf_map_update_elem(&pages, &key, &one, BPF_ANY);
	}
	return 0;
}

/* ---- mmap_lock ---- */

static __always_inline void tell_wait(struct thread *t, struct task_struct *task, __u32 target, __u64 now, __u32 flags)
{
	struct record_wait *record = reserve(sizeof(*record));
	if (!record)
		return;
	struct deed deed;
	find_deed(&deed, t->fault_at ? t : NULL, task);
	fill_header(&record->header, KIND_WAIT, task, target);
	tell_deed(&record->header, &deed);
	record->mm = t->wait_mm;
	record->at = t->wait_since;
	record->until = now;
	record->address = deed.address;
	record->length = deed.length;
	record->file = t->file;
	record->page = t->page;
	record->flags = flags;
	record->owner = t->wait_owner;
	record->cpu = t->wait_cpu;
	record->granted = t->wait_granted;
	submit(record);
}

static __always_inline int start_locking(struct mm_struct *mm, bool write)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 target = watched(mm);
	if (!target)
		return 0;
	struct thread *t = known(task);
	if (!t)
		t = made(task);
	/* Reclaim tries the locks of whole lists of processes, the thread's own among them; it never waits for one. */
	if (!t || t->reclaim_at)
		return 0;
	__u64 now = bpf_ktime_get_ns();
	if (t->fault_at) {
		/* A fault writes when it lets a stack grow. */
		if (!in_fault(t, task) || task->mm != mm)
			finish_fault(t, task, fault_end(t));
		else if (!t->retry_at) {
			/* What went before was an attempt: without the lock, or under it, which was given up for a read. */
			t->fault_flags |= FAULT_LOCKED;
			t->first = now - t->fault_at - t->waited;
			t->tried = t->mapping != 0;
		}
	}
	if (!t->fault_at) {
		t->file.ino = 0;
		t->file.dev = 0;
		t->page = 0;
	}
	t->wait_target = target;
	t->wait_since = now;
	t->wait_cpu = 0;
	t->wait_granted = 0;
	t->wait_flags = write ? LOCK_WRITE : 0;
	t->wait_owner = 0;
	if (mm->mmap_lock.count.counter & 1) { /* RWSEM_WRITER_LOCKED */
		struct task_struct *owner = (void *)(mm->mmap_lock.owner.counter & ~7ULL);
		int tid = 0;
		if (owner)
			bpf_core_read(&tid, sizeof(tid), &owner->pid);
		t->wait_owner = tid;
	}
	/* Last: whoever looks at this thread from elsewhere sees a wait when it is complete. */
	barrier();
	t->wait_mm = (__u64)mm;
	return 0;
}

static __noinline int tell_stray(struct mm_struct *mm, __u32 target, __u32 what, __u32 flags)
{
	struct record_stray *record = reserve(sizeof(*record));
	if (!record)
		return 0;
	struct task_struct *task = bpf_get_current_task_btf();
	fill_header(&record->header, KIND_STRAY, task, target);
	record->mm = (__u64)mm;
	record->at = bpf_ktime_get_ns();
	record->what = what;
	record->flags = flags;
	submit(record);
	return 0;
}

#define PROC_SUPER_MAGIC 0x9fa0
#define NAME_LEN sizeof(((struct record_hold *)0)->name)

/* Names the file of /proc that a system call reads from: 4711/smaps, say. `name` and `parent` are as long as in the records. */
static __always_inline void name_read(char *name, char *parent, __u16 syscall, struct task_struct *task)
{
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);
	unsigned int fd;
	switch (syscall) {
	case 0: case 17: case 19: case 295: case 327: /* read, pread64, readv, preadv, preadv2 */
		fd = regs->di;
		break;
	case 40: /* sendfile */
		fd = regs->si;
		break;
	default:
		return;
	}
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	if (fd >= BPF_CORE_READ(table, max_fds))
		return;
	struct file **all = BPF_CORE_READ(table, fd), *file = NULL;
	bpf_probe_read_kernel(&file, sizeof(file), all + fd);
	if (!file || BPF_CORE_READ(file, f_inode, i_sb, s_magic) != PROC_SUPER_MAGIC)
		return;
	struct dentry *dentry = BPF_CORE_READ(file, f_path.dentry);
	bpf_probe_read_kernel_str(name, NAME_LEN, BPF_CORE_READ(dentry, d_name.name));
	bpf_probe_read_kernel_str(parent, NAME_LEN, BPF_CORE_READ(dentry, d_parent, d_name.name));
}

static __always_inline void tell_hold(struct hold *hold, struct task_struct *task, __u64 now, __u32 flags)
{
	struct record_hold *record = reserve(sizeof(*record));
	if (!record)
		return;
	fill_header(&record->header, KIND_HOLD, task, hold->target);
	record->header.doing = hold->doing;
	record->header.syscall = hold->syscall;
	record->mm = hold->mm;
	record->at = hold->at;
	record->until = now;
	record->address = hold->address;
	record->length = hold->length;
	record->file = hold->file;
	record->page = hold->page;
	record->flags = flags;
	record->stack = hold->stack;
	record->longest = hold->longest;
	for (int i = 0; i < CAUSES; i++)
		record->cause[i] = hold->cause[i];
	record->name[0] = 0;
	record->parent[0] = 0;
	record->waker = hold->waker;
	if (hold->doing == DOING_SYSCALL)
		name_read(record->name, record->parent, hold->syscall, task);
	submit(record);
}

static __always_inline void open_hold(struct hold *hold, struct thread *t, struct task_struct *task, struct mm_struct *mm,
				      __u32 target, __u64 now, __u32 flags)
{
	struct deed deed;
	find_deed(&deed, t->fault_at ? t : NULL, task);
	hold->at = now;
	hold->target = target;
	hold->flags = flags;
	hold->doing = deed.doing;
	hold->syscall = deed.syscall;
	hold->address = deed.address;
	hold->length = deed.length;
	hold->longest = 0;
	hold->stack = NO_STACK;
	hold->slept_for_file = 0;
	hold->waker.tid = 0;
	hold->file = t->file;
	hold->page = t->page;
	for (int i = 0; i < CAUSES; i++)
		hold->cause[i] = 0;
	barrier();
	hold->mm = (__u64)mm;
}

static __always_inline struct hold *hold_of(struct thread *t, __u64 mm)
{
	if (t->holds[0].mm == mm)
		return &t->holds[0];
	if (t->holds[1].mm == mm)
		return &t->holds[1];
	return NULL;
}

static __always_inline bool worth_telling(struct hold *hold, bool contended, __u64 now)
{
	return contended || now - hold->at >= settings.hold_ns || (settings.every_fault && hold->flags & LOCK_WRITE);
}

static __always_inline int acquire_returned(struct mm_struct *mm, bool write, bool success)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct thread *t = known(task);
	bool started = t && t->wait_mm == (__u64)mm;
	__u32 target = started ? t->wait_target : watched(mm);
	if (!target)
		return 0;
	if (!t)
		t = made(task);
	if (!t || t->reclaim_at)
		return 0;
	__u64 now = bpf_ktime_get_ns();
	if (started) {
		__u64 waited = now - t->wait_since;
		if (waited >= settings.wait_ns)
			tell_wait(t, task, target, now, t->wait_flags | (success ? 0 : LOCK_FAILED));
		if (t->fault_at)
			t->waited += waited;
		t->wait_mm = 0;
	}
	struct hold *held = hold_of(t, (__u64)mm);
	if (held) {
		/* (A downgrade is told before it is made.) */
		if (!started && !write && held->flags & LOCK_WRITE && success) {
			/* A downgrade: the part that stops readers ends here. */
			bool contended = is_contended(mm);
			if (worth_telling(held, contended, now))
				tell_hold(held, task, now,
					  held->flags | LOCK_DOWNGRADES | (contended ? LOCK_CONTENDED : 0));
			held->flags = LOCK_DOWNGRADED;
			held->at = now;
			held->longest = 0;
			held->stack = NO_STACK;
			held->waker.tid = 0;
			for (int i = 0; i < CAUSES; i++)
				held->cause[i] = 0;
			return 0;
		}
		if (!success)
			return 0;
		/* Taken twice: its release was not seen. */
		tell_stray(mm, target, STRAY_ACQUIRE, write ? LOCK_WRITE : 0);
		held->mm = 0;
	}
	if (!success)
		return 0;
	struct hold *free = hold_of(t, 0);
	if (!free) {
		__sync_fetch_and_add(&losses.slots, 1);
		return 0;
	}
	if (!t->fault_at)
		t->looking = 0;
	open_hold(free, t, task, mm, target, now, write ? LOCK_WRITE : 0);
	/* A lone one: a downgrade of a lock that was taken before we came, or the end of a wait that began before. */
	if (!started && !write && mm->mmap_lock.count.counter & 1)
		free->flags |= LOCK_DOWNGRADED;
	if (t->fault_at && started)
		t->retry_at = now;
	return 0;
}

static __always_inline int released(struct mm_struct *mm)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct thread *t = known(task);
	struct hold *held = t ? hold_of(t, (__u64)mm) : NULL;
	if (t && t->reclaim_at)
		return 0;
	if (!t || !held) {
		__u32 target = watched(mm);
		if (target)
			tell_stray(mm, target, STRAY_RELEASE, mm->mmap_lock.count.counter & 1 ? LOCK_WRITE : 0);
		return 0;
	}
	__u64 now = bpf_ktime_get_ns();
	bool contended = is_contended(mm);
	if (worth_telling(held, contended, now)) {
		t->told = 1;
		if (held->file.ino && t->mapping)
			tell_file((struct address_space *)t->mapping, held->file.ino);
		tell_hold(held, task, now, held->flags | (contended ? LOCK_CONTENDED : 0));
	}
	held->mm = 0;
	if (t->fault_at && t->retry_at && task->mm == mm) {
		if (task->maj_flt + task->min_flt != t->faults_before)
			finish_fault(t, task, now);
		else
			t->retry_at = 0; /* given up to read; it will be tried again */
	}
	return 0;
}

SEC("tp_btf/mmap_lock_start_locking")
int mmap_start_locking(__u64 *ctx)
{
	return start_locking((struct mm_struct *)ctx[0], ctx[1] & 1);
}

SEC("tp_btf/mmap_lock_acquire_returned")
int mmap_acquire_returned(__u64 *ctx)
{
	return acquire_returned((struct mm_struct *)ctx[0], ctx[1] & 1, ctx[2] & 1);
}

SEC("tp_btf/mmap_lock_released")
int mmap_released(__u64 *ctx)
{
	return released((struct mm_struct *)ctx[0]);
}

/* Kernels before 6.14 pass the path of a cgroup before `write`. Of these three and those above, one set is loaded. */

SEC("tp_btf/mmap_lock_start_locking")
int path_start_locking(__u64 *ctx)
{
	return start_locking((struct mm_struct *)ctx[0], ctx[2] & 1);
}

SEC("tp_btf/mmap_lock_acquire_returned")
int path_acquire_returned(__u64 *ctx)
{
	return acquire_returned((struct mm_struct *)ctx[0], ctx[2] & 1, ctx[3] & 1);
}

/* ---- The scheduler ---- */

static __always_inline void charge(struct thread *t, __u64 now)
{
	__u64 off = now - t->off_at;
	__u64 cpu = t->woken_at && t->woken_at < now ? now - t->woken_at : 0;
	if (cpu > off)
		cpu = off;
	__u64 slept = off - cpu;
	__u32 why = t->off_why;
	t->off_at = 0;
	t->on_at = now;
	if (t->wait_mm) {
		t->wait_cpu += cpu;
		/* Woken, that is; one that was preempted has been given nothing. */
		t->wait_granted = slept ? cpu : 0;
		return;
	}
	if (t->reclaim_at) {
		/* Charged as a whole when reclaim ends; time without a processor is part of it. */
		return;
	}
	if (why >= CAUSES)
		return;
	if (t->fault_at) {
		t->cause[CAUSE_CPU] += cpu;
		t->cause[why] += slept;
		if (t->retry_at)
			t->retry_asleep += slept;
		if (t->off_stack >= 0)
			t->stack = t->off_stack;
	}
	for (int i = 0; i < HOLDS; i++) {
		struct hold *hold = &t->holds[i];
		if (!hold->mm)
			continue;
		hold->cause[CAUSE_CPU] += cpu;
		hold->cause[why] += slept;
		if (slept > hold->longest) {
			hold->longest = slept;
			hold->stack = t->off_stack;
			hold->waker = t->waker;
			if (t->looking) {
				hold->file = t->file;
				hold->page = t->page;
			}
		}
	}
}

SEC("tp_btf/sched_switch")
int BPF_PROG(sched_switch, bool preempt, struct task_struct *prev, struct task_struct *next, unsigned int state)
{
	struct thread *t = known(prev);
	if (t) {
		bool holding = t->holds[0].mm || t->holds[1].mm;
		/* Stopped, or traced: then it is on its way out of the fault. */
		if (t->fault_at && !t->wait_mm && ((state & 0xc) || !in_fault(t, prev)))
			finish_fault(t, prev, fault_end(t));
		if (t->fault_at || holding || t->wait_mm) {
			__u64 now = bpf_ktime_get_ns();
			bool runnable = preempt || !state;
			t->waker.tid = 0;
			t->off_at = now;
			t->woken_at = runnable ? now : 0;
			t->off_why = t->in_lock ? CAUSE_LOCK : t->looking ? t->looking - 1 : CAUSE_OTHER;
			t->off_stack = NO_STACK;
			if (!runnable && !t->wait_mm && (holding || t->off_why == CAUSE_OTHER)) {
				long stack = bpf_get_stackid(ctx, &stacks, 0);
				t->off_stack = stack >= 0 ? stack : NO_STACK;
			}
		}
	}
	t = known(next);
	if (t && t->off_at)
		charge(t, bpf_ktime_get_ns());
	return 0;
}

SEC("tp_btf/sched_wakeup")
int BPF_PROG(sched_wakeup, struct task_struct *task)
{
	struct thread *t = known(task);
	if (t && t->off_at && !t->woken_at)
		t->woken_at = bpf_ktime_get_ns();
	return 0;
}

/*
 * Tells which thread ends a holder's sleep. One that waits for a VMA's readers is woken by the last of them, which need not have
 * mmap_lock. Here, unlike in sched_wakeup, the waker is the thread that runs. (An interrupt may wake a thread from another sleep. The reader
 * of the ring leaves out what was no wait for a VMA.) A thread that is being killed may be woken by anybody.
 */
#define SIGKILL_BIT (1UL << (9 - 1))

SEC("tp_btf/sched_waking")
int BPF_PROG(sched_waking, struct task_struct *task)
{
	struct thread *t = known(task);
	if (!t || !t->off_at || t->woken_at || !(t->holds[0].mm || t->holds[1].mm))
		return 0;
	if (t->off_why != CAUSE_OTHER || task->pending.signal.sig[0] & SIGKILL_BIT)
		return 0;
	struct task_struct *current = bpf_get_current_task_btf();
	struct thread *its = known(current);
	struct waker *waker = &t->waker;
	struct deed deed;
	bool faults = its && (in_fault(its, current) || leaves_fault(its, current));
	find_deed(&deed, faults ? its : NULL, current);
	waker->pid = current->tgid;
	waker->doing = deed.doing;
	waker->syscall = deed.syscall;
	waker->name[0] = 0;
	waker->parent[0] = 0;
	bpf_probe_read_kernel_str(waker->comm, sizeof(waker->comm), current->comm);
	if (deed.doing == DOING_SYSCALL)
		name_read(waker->name, waker->parent, deed.syscall, current);
	waker->tid = current->pid;
	return 0;
}

/* ---- Other locks, and reclaim ---- */

#define LCB_F_SPIN 1

SEC("tp_btf/contention_begin")
int BPF_PROG(contention_begin, void *lock, unsigned int flags)
{
	if (flags & LCB_F_SPIN)
		return 0;
	struct thread *t = known(bpf_get_current_task_btf());
	if (t && !t->wait_mm)
		t->in_lock = (__u64)lock;
	return 0;
}

SEC("tp_btf/contention_end")
int BPF_PROG(contention_end, void *lock, int result)
{
	struct thread *t = known(bpf_get_current_task_btf());
	if (t && t->in_lock == (__u64)lock)
		t->in_lock = 0;
	return 0;
}

static __always_inline int begin_reclaim(void)
{
	struct thread *t = known(bpf_get_current_task_btf());
	if (!t || t->reclaim_at || t->wait_mm)
		return 0;
	is_busy(t, bpf_get_current_task_btf());
	t->reclaim_at = bpf_ktime_get_ns();
	return 0;
}

static __always_inline int end_reclaim(void)
{
	struct thread *t = known(bpf_get_current_task_btf());
	if (!t || !t->reclaim_at)
		return 0;
	__u64 took = bpf_ktime_get_ns() - t->reclaim_at;
	t->reclaim_at = 0;
	if (t->fault_at)
		t->cause[CAUSE_RECLAIM] += took;
	for (int i = 0; i < HOLDS; i++)
		if (t->holds[i].mm)
			t->holds[i].cause[CAUSE_RECLAIM] += took;
	return 0;
}

SEC("tp_btf/mm_vmscan_direct_reclaim_begin")
int BPF_PROG(direct_reclaim_begin)
{
	return begin_reclaim();
}

SEC("tp_btf/mm_vmscan_direct_reclaim_end")
int BPF_PROG(direct_reclaim_end)
{
	return end_reclaim();
}

SEC("tp_btf/mm_vmscan_memcg_reclaim_begin")
int BPF_PROG(memcg_reclaim_begin)
{
	return begin_reclaim();
}

SEC("tp_btf/mm_vmscan_memcg_reclaim_end")
int BPF_PROG(memcg_reclaim_end)
{
	return end_reclaim();
}

/* ---- Storage ---- */

SEC("tp_btf/block_rq_complete")
int BPF_PROG(block_rq_complete, struct request *rq, int error, unsigned int bytes)
{
	if (rq->cmd_flags & 1) /* a write */
		return 0;
	struct bio *bio = rq->bio;
	if (!bio || !rq->start_time_ns)
		return 0;
	struct bio_vec *vec = BPF_CORE_READ(bio, bi_io_vec);
	struct page *page = NULL;
	unsigned int first = BPF_CORE_READ(bio, bi_iter.bi_idx);
	vec = (void *)vec + first * bpf_core_type_size(struct bio_vec);
	page = BPF_CORE_READ(vec, bv_page);
	if (!page)
		return 0;
	struct folio *folio = folio_of(page);
	struct address_space *mapping = BPF_CORE_READ(folio, mapping);
	if (!mapping || (unsigned long)mapping & 3) /* anonymous memory: direct I/O, or swap */
		return 0;
	struct page_key page_key = { .mapping = (__u64)mapping, .index = BPF_CORE_READ(folio, index) };
	if (!bpf_map_lookup_elem(&pages, &page_key))
		return 0;
	bpf_map_delete_elem(&pages, &page_key);
	struct inode *inode = BPF_CORE_READ(mapping, host);
	struct file_id id = {};
	id.ino = BPF_CORE_READ(inode, i_ino);
	id.dev = BPF_CORE_READ(inode, i_sb, s_dev);
	struct record_io *record = reserve(sizeof(*record));
	if (!record)
		return 0;
	/* Whoever the interrupt found here has nothing to do with it. */
	__builtin_memset(&record->header, 0, sizeof(record->header));
	record->header.kind = KIND_IO;
	record->at = rq->start_time_ns;
	record->until = bpf_ktime_get_ns();
	record->file = id;
	record->page = page_key.index;
	record->bytes = bytes;
	record->flags = 0;
	submit(record);
	return 0;
}

#define FUSE_READ 15

SEC("tp_btf/fuse_request_send")
int BPF_PROG(fuse_request_send, const struct fuse_req *req)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct thread *t = known(task);
	if (!t || !t->looking)
		return 0;
	if (BPF_CORE_READ(req, in.h.opcode) != FUSE_READ)
		return 0;
	/* A page that is there already, whose first read failed, is read again without being added. */
	t->looking = CAUSE_DEVICE + 1;
	if (t->fault_at && t->retry_at && t->tried)
		t->fault_flags |= FAULT_GONE;
	if (!settings.every_fault)
		return 0;
	__u64 key = (__u64)req;
	struct fuse_sent sent = {};
	sent.at = bpf_ktime_get_ns();
	sent.unique = BPF_CORE_READ(req, in.h.unique);
	sent.page = t->page;
	sent.file = t->file;
	fill_header(&sent.header, KIND_IO, task, task->tgid);
	bpf_map_update_elem(&fuse_requests, &key, &sent, BPF_ANY);
	return 0;
}

SEC("tp_btf/fuse_request_end")
int BPF_PROG(fuse_request_end, const struct fuse_req *req)
{
	__u64 key = (__u64)req;
	struct fuse_sent *sent = bpf_map_lookup_elem(&fuse_requests, &key);
	if (!sent)
		return 0;
	/* The same address, and another request: the end of the one that was sent was not seen. */
	bool same = sent->unique == BPF_CORE_READ(req, in.h.unique);
	struct record_io *record = same ? reserve(sizeof(*record)) : NULL;
	if (record) {
		record->header = sent->header;
		record->at = sent->at;
		record->until = bpf_ktime_get_ns();
		record->file = sent->file;
		record->page = sent->page;
		record->bytes = 0;
		record->flags = IO_FUSE;
		submit(record);
	}
	bpf_map_delete_elem(&fuse_requests, &key);
	return 0;
}

/* ---- Threads and processes ---- */

SEC("tp_btf/sched_process_fork")
int BPF_PROG(process_fork, struct task_struct *parent, struct task_struct *child)
{
	__u32 pid = child->tgid, from = parent->tgid;
	if (pid == from)
		return 0;
	__u8 *how = bpf_map_lookup_elem(&targets, &from), watch = TARGET_WATCHED;
	if (over || !how || (*how == TARGET_WATCHED && !settings.follow_children))
		return 0;
	if (bpf_map_update_elem(&targets, &pid, &watch, BPF_ANY)) {
		__sync_fetch_and_add(&losses.targets, 1);
		return 0;
	}
	tell_task(child, TASK_FORK, parent->tgid);
	return 0;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(process_exec, struct task_struct *task, int old_pid)
{
	if (is_target(task->tgid))
		tell_task(task, TASK_EXEC, 0);
	return 0;
}

SEC("tp_btf/task_rename")
int BPF_PROG(task_rename, struct task_struct *task, const char *name)
{
	struct thread *t = known(task);
	if (t && (t->is_target || t->told))
		tell_name(task, name, TASK_SEEN, 0);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(process_exit, struct task_struct *task)
{
	struct thread *t = known(task);
	__u32 pid = task->tgid;
	if (t)
		finish_fault(t, task, fault_end(t));
	if (t || is_target(pid))
		tell_task(task, TASK_EXIT, 0);
	if (task->signal->live.counter == 0) /* the last thread */
		bpf_map_delete_elem(&targets, &pid);
	return 0;
}

/* ---- What is going on just now ---- */

SEC("iter/task")
int going_on(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	if (!task)
		return 0;
	struct thread *t = bpf_task_storage_get(&threads, task, 0, 0);
	if (!t)
		return 0;
	struct seq_file *seq = ctx->meta->seq;
	for (int i = 0; i < HOLDS; i++) {
		struct hold *hold = &t->holds[i];
		if (!hold->mm)
			continue;
		__u64 now = over ? over : bpf_ktime_get_ns();
		if (hold->at > now)
			continue;
		struct record_hold record = {};
		fill_header(&record.header, KIND_HOLD, task, hold->target);
		record.header.doing = hold->doing;
		record.header.syscall = hold->syscall;
		record.mm = hold->mm;
		record.at = hold->at;
		record.until = now;
		record.address = hold->address;
		record.length = hold->length;
		record.file = hold->file;
		record.page = hold->page;
		record.flags = hold->flags | LOCK_OPEN;
		record.stack = hold->stack;
		record.longest = hold->longest;
		record.waker = hold->waker;
		__u64 off = t->off_at;
		if (off && off < now && now - off > hold->longest && !t->woken_at) {
			/* It still sleeps, so no thread has woken it. */
			record.longest = now - off;
			record.stack = t->off_stack;
			record.waker.tid = 0;
			if (t->looking) {
				record.file = t->file;
				record.page = t->page;
			}
		}
		for (int j = 0; j < CAUSES; j++)
			record.cause[j] = hold->cause[j];
		if (off && off < now && t->off_why < CAUSES)
			record.cause[t->woken_at ? CAUSE_CPU : t->off_why] += now - off;
		if (hold->doing == DOING_SYSCALL)
			name_read(record.name, record.parent, hold->syscall, task);
		bpf_seq_write(seq, &record, sizeof(record));
	}
	__u64 now = over ? over : bpf_ktime_get_ns();
	__u64 waiting = t->wait_mm && t->wait_since < now ? now - t->wait_since : 0;
	if (waiting) {
		struct record_wait record = {};
		struct deed deed;
		fill_header(&record.header, KIND_WAIT, task, t->wait_target);
		find_deed(&deed, t->fault_at ? t : NULL, task);
		tell_deed(&record.header, &deed);
		record.mm = t->wait_mm;
		record.at = t->wait_since;
		record.until = now;
		record.address = deed.address;
		record.length = deed.length;
		record.file = t->file;
		record.page = t->page;
		record.flags = t->wait_flags | LOCK_OPEN;
		record.owner = t->wait_owner;
		record.cpu = t->wait_cpu;
		record.granted = 0;
		bpf_seq_write(seq, &record, sizeof(record));
	}
	/* After the end, the thread may have gone on unseen. */
	if (t->fault_at && t->fault_at < now && (waiting || (t->off_at && (over || in_fault(t, task))))) {
		struct record_fault record = {};
		fill_header(&record.header, KIND_FAULT, task, task->tgid);
		record.header.doing = t->fault_flags & FAULT_KERNEL ? DOING_SYSCALL_FAULT : DOING_FAULT;
		record.at = t->fault_at;
		record.address = t->address;
		record.ip = t->ip;
		record.file = t->file;
		record.page = t->page;
		record.flags = t->fault_flags | FAULT_OPEN;
		record.stack = t->off_stack;
		record.took = now - t->fault_at;
		record.first = t->fault_flags & FAULT_LOCKED ? t->first : now - t->fault_at;
		record.wait = t->waited + waiting;
		record.retry = t->retry_at && t->retry_at < now ? now - t->retry_at : 0;
		record.retry_asleep = t->retry_asleep;
		for (int j = 0; j < CAUSES; j++)
			record.cause[j] = t->cause[j];
		__u64 off = t->off_at;
		if (!waiting && off && off < now && t->off_why < CAUSES)
			record.cause[t->woken_at ? CAUSE_CPU : t->off_why] += now - off;
		bpf_seq_write(seq, &record, sizeof(record));
	}
	return 0;
}
