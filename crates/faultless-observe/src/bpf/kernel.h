/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the observer reads of the kernel's structures: fields by name alone. libbpf finds where they lie in the running
 * kernel, from its BTF, when it loads the programs (CO-RE), so neither order nor size matter here.
 */
#ifndef FAULTLESS_KERNEL_H
#define FAULTLESS_KERNEL_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u64 __be64;
typedef __u32 __wsum;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_STACK_TRACE = 7,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_RINGBUF = 27,
	BPF_MAP_TYPE_TASK_STORAGE = 29,
};
enum { BPF_F_NO_PREALLOC = 1, BPF_ANY = 0, BPF_NOEXIST = 1, BPF_LOCAL_STORAGE_GET_F_CREATE = 1 };
enum { BPF_RB_NO_WAKEUP = 1, BPF_RB_FORCE_WAKEUP = 2, BPF_RB_AVAIL_DATA = 0 };

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;
typedef struct {
	long long counter;
} atomic_long_t;

struct hlist_node {
	struct hlist_node *next;
};
struct hlist_head {
	struct hlist_node *first;
};
struct qstr {
	const unsigned char *name;
};
struct super_block {
	__u32 s_dev;
	unsigned long s_magic;
};
struct dentry {
	struct dentry *d_parent;
	struct qstr d_name;
	struct hlist_node d_alias;
};
/* Up to and including Linux 7.0, d_alias lies in a union with the name d_u. */
struct dentry___before_7_1 {
	union {
		struct hlist_node d_alias;
	} d_u;
};
struct inode {
	unsigned long i_ino;
	struct super_block *i_sb;
	struct hlist_head i_dentry;
};
struct optimistic_spin_queue {
	atomic_t tail;
};
struct rw_semaphore {
	atomic_long_t count;
	atomic_long_t owner;
	struct optimistic_spin_queue osq;
};
struct address_space {
	struct inode *host;
	struct rw_semaphore invalidate_lock;
};
struct folio {
	struct address_space *mapping;
	unsigned long index;
};
struct page {
	unsigned long compound_info;
};
/* Its name in Linux 6.18. */
struct page___with_head {
	unsigned long compound_head;
};
struct bio_vec {
	struct page *bv_page;
};
struct bvec_iter {
	unsigned int bi_idx;
};
struct bio {
	struct bvec_iter bi_iter;
	struct bio_vec *bi_io_vec;
};
struct request {
	struct bio *bio;
	__u64 start_time_ns;
	__u32 __data_len;
	__u32 cmd_flags;
};
struct path {
	struct dentry *dentry;
};
struct file {
	struct path f_path;
	struct inode *f_inode;
};
struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};
struct files_struct {
	struct fdtable *fdt;
};
struct mm_struct {
	struct rw_semaphore mmap_lock;
	struct task_struct *owner;
};
struct signal_struct {
	atomic_t live;
};
typedef struct {
	unsigned long sig[1];
} sigset_t;
struct sigpending {
	sigset_t signal;
};
struct task_struct {
	unsigned int flags;
	int pid;
	int tgid;
	struct mm_struct *mm;
	unsigned long maj_flt;
	unsigned long min_flt;
	int pagefault_disabled;
	char comm[16];
	struct files_struct *files;
	struct signal_struct *signal;
	struct sigpending pending;
};
struct pt_regs {
	unsigned long di;
	unsigned long si;
	unsigned long dx;
	unsigned long orig_ax;
	unsigned long ip;
};
struct fuse_in_header {
	__u32 opcode;
	__u64 unique;
	__u64 nodeid;
};
struct fuse_req {
	struct {
		struct fuse_in_header h;
	} in;
};
struct seq_file;
struct bpf_iter_meta {
	struct seq_file *seq;
};
struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

#pragma clang attribute pop

#endif
