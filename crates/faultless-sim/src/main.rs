//! The simulator: the engine as it ships, over a kernel that is faked, under a scheduler whose choices come from a seed.
//!
//! Each seed is a run in a process of its own (`runner`). In it, all threads of the engine and of a made-up program (`workload`)
//! are coroutines of one thread (`scheduler`). Every system call goes to a simulated kernel (`kernel`), and at every call and
//! every access to an atomic or a lock another thread may get its turn. The kernel fails as real ones do: disks, memory, signals that
//! interrupt, handlers that never return, threads that are cancelled, leases that are broken and taken, descriptors that are closed,
//! forks. The `oracle` knows what each page must hold.
//!
//! It is built under `--cfg faultless_sim`: `./run simulate`.

#[cfg(faultless_sim)]
mod kernel;
#[cfg(faultless_sim)]
mod oracle;
#[cfg(faultless_sim)]
mod plan;
#[cfg(faultless_sim)]
mod rng;
#[cfg(faultless_sim)]
mod runner;
#[cfg(faultless_sim)]
mod scheduler;
#[cfg(faultless_sim)]
mod workload;
#[cfg(faultless_sim)]
mod world;

#[cfg(faultless_sim)]
fn main() -> std::process::ExitCode {
    runner::main()
}

#[cfg(not(faultless_sim))]
fn main() -> std::process::ExitCode {
    eprintln!(
        "faultless-sim: it was built without --cfg faultless_sim, so there is no simulated kernel in it; use ./run simulate"
    );
    std::process::ExitCode::from(2)
}
