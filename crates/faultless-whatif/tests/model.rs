//! What the model says, as claims.

use faultless_whatif::compare::{Sweep, compare, designs, run_all};
use faultless_whatif::designs::DESIGNS;
use faultless_whatif::run::{Outcome, simulate};
use faultless_whatif::workload::{BUILT_IN, Workload, built_in};
use proptest::prelude::*;

fn under(workload: &Workload, design: &str) -> Outcome {
    simulate(workload, design, 1).expect("it can be run")
}

fn short(name: &str, seconds: f64) -> Workload {
    let mut w = built_in(name).expect("it is built in");
    w.seconds = seconds;
    w
}

#[test]
fn every_built_in_workload_runs_under_every_design() {
    for (name, _) in BUILT_IN {
        let mut w = short(name, 0.05);
        w.warm_up = 0.02;
        for design in DESIGNS {
            let o = under(&w, design.id);
            assert!(o.events > 100, "{name} under {}", design.id);
            assert_eq!(o.groups[0].name, w.threads[0].name);
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_figures_and_another_one_others() {
    let w = short("churn", 0.1);
    let text = |seed| {
        let o = simulate(&w, "vma-then-mmap", seed).expect("it runs");
        format!("{o:?}")
    };
    assert_eq!(text(7), text(7));
    assert_ne!(text(7), text(8));
}

/// Published in 2010: 55 iterations a second before, 15,000 after (which is an input here). Here 27 before: the lock of those days went in
/// order, so each call of the loop waits for one fault, and an iteration, of two calls, for two. That is just beyond a factor of two.
#[test]
fn dropping_the_lock_for_the_read_helped_in_2010() {
    let w = built_in("loop-2010").expect("it is built in");
    let b = |design| under(&w, design).group("B").expect("a group").per_second;
    let ratio = b("drop-retry") / b("hold-mmap");
    let published = 15_000.0 / 55.0;
    assert!(
        (published / 2.05..published * 2.05).contains(&ratio),
        "{ratio}"
    );
}

/// Song's objection to holding a VMA's lock: a writer waits for the read, with mmap_lock, and everybody behind it.
#[test]
fn one_slow_fault_stalls_the_others_under_vma_hold_and_not_under_vma_retry() {
    let w = short("slow-fault", 2.0);
    let longest = |design| {
        under(&w, design)
            .group("other")
            .expect("a group")
            .round_us
            .max
    };
    assert!(longest("vma-hold") > 30_000.0);
    assert!(longest("vma-retry") < 2_000.0);
    assert!(longest("vma-then-mmap") < 2_000.0);
}

/// Wilcox's: under a tight limit pages go between the read and the retry, so the retry reads them again, under mmap_lock.
#[test]
fn where_memory_is_tight_a_retry_finds_pages_gone_and_holding_the_lock_does_not() {
    let w = Workload::parse(
        r#"
        name = "tight"
        cores = 2
        memory = "256 KiB"
        seconds = 1.0
        [[files]]
        name = "data"
        size = "1 GiB"
        [[threads]]
        name = "reader"
        count = 48
        loop = [{ read = { of = "data" } }]
        [[threads]]
        name = "churn"
        count = 8
        loop = [{ map = "16 KiB" }, "unmap"]
        "#,
    )
    .expect("a workload");
    let today = under(&w, "vma-then-mmap");
    assert!(today.gone_at_retry_percent > 1.0, "{today:?}");
    assert!(today.read_again_percent > 1.0, "{today:?}");
    let hold = under(&w, "vma-hold");
    // (A page can go in the moment between its read and its mapping.)
    assert!(hold.read_again_percent < 0.1, "{hold:?}");
}

#[test]
fn a_design_that_needs_no_mmap_lock_takes_none_for_a_quiet_reader() {
    let w = short("quiet", 0.2);
    for design in ["vma-retry", "vma-hold", "faultless"] {
        assert_eq!(under(&w, design).mmap_locks_per_second, 0.0, "{design}");
    }
    let today = under(&w, "vma-then-mmap");
    let per_read = today.mmap_locks_per_second / today.groups[0].per_second;
    assert!((per_read - 1.0).abs() < 0.01, "{per_read}");
}

#[test]
fn a_sweep_has_all_its_points_and_a_page() {
    let sweep: Sweep = "threads=1..8".parse().expect("a sweep");
    assert_eq!(sweep.values, [1, 2, 4, 8]);
    let chosen = designs(&["vma-hold".into(), "faultless".into()]).expect("designs");
    let c = compare(&short("churn", 0.02), &chosen, Some(sweep), 1, |_, _| {}).expect("it runs");
    assert_eq!(c.points.len(), 4);
    assert!(c.points.iter().all(|p| p.outcomes.len() == 2));
    let page = faultless_whatif::html::page(&c).expect("a page");
    assert!(page.contains("<svg") && page.contains("vma-hold"));
    for text in [
        "threads",
        "threads=0..4",
        "threads=x",
        "speed=1,2",
        "threads=8..1",
    ] {
        assert!(text.parse::<Sweep>().is_err(), "{text}");
    }
    assert!("wakeup=1000,2000".parse::<Sweep>().is_ok());
}

#[test]
fn what_is_wrong_with_a_workload_is_said() {
    let wrong = |text: &str, says: &str| {
        let e = Workload::parse(text).expect_err("it is wrong").to_string();
        assert!(e.contains(says), "{e}");
    };
    wrong("name = \"x\"\nthreads = []", "0 threads");
    wrong("name = \"x\"\nspeed = 3\nthreads = []", "speed");
    let threads = |l: &str| format!("name = \"x\"\n[[threads]]\nname = \"t\"\nloop = {l}\n");
    wrong(&threads("[]"), "do nothing");
    wrong(&threads("[\"unmap\"]"), "has not mapped");
    wrong(
        &threads("[{ map = \"64 KiB\" }]"),
        "maps more than it unmaps",
    );
    wrong(&threads("[{ map = \"64\" }, \"unmap\"]"), "with its unit");
    wrong(
        &threads("[{ read = { of = \"nothing\" } }]"),
        "there is no file or region nothing",
    );
    assert!(simulate(&short("quiet", 0.01), "magic", 1).is_err());
}

#[test]
fn a_workload_is_the_same_when_it_is_read_back_from_its_text() {
    for (name, _) in BUILT_IN {
        let w = built_in(name).expect("it is built in");
        let text = w.to_text().expect("a text");
        assert_eq!(Workload::parse(&text).expect("it reads"), w, "{name}");
    }
}

fn step() -> impl Strategy<Value = Vec<String>> {
    prop_oneof![
        Just(vec!["{ read = { of = \"data\" } }".to_owned()]),
        Just(vec![
            "{ read = { of = \"data\", order = \"uniform\" } }".to_owned()
        ]),
        Just(vec![
            "{ read = { of = \"heap\", order = \"zipf\" } }".to_owned()
        ]),
        Just(vec!["{ page-out = \"heap\" }".to_owned()]),
        Just(vec!["\"fork\"".to_owned()]),
        Just(vec!["{ punch = \"data\" }".to_owned()]),
        Just(vec!["{ protect = \"data\" }".to_owned()]),
        Just(vec!["{ protect = \"heap\" }".to_owned()]),
        Just(vec!["{ smaps = \"app\" }".to_owned()]),
        Just(vec!["{ work-us = 3.0 }".to_owned()]),
        Just(vec!["{ sleep-us = 50.0 }".to_owned()]),
        (1u32..40).prop_map(|n| vec![
            format!("{{ map = \"{} KiB\" }}", 4 * n),
            "\"touch\"".to_owned(),
            "\"unmap\"".to_owned()
        ]),
        Just(vec![
            "{ map-file = \"data\" }".to_owned(),
            "\"unmap\"".to_owned()
        ]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever threads do: the invariants, which are assertions in the model, hold under every design, and nobody waits for ever.
    #[test]
    fn any_workload_keeps_the_invariants(
        groups in prop::collection::vec((1u32..6, prop::collection::vec(step(), 1..4)), 1..4),
        cores in 1u32..5,
        memory in 64u64..4096,
        read_ahead in 0u32..20,
        kind in 0u32..4,
        preempt in any::<bool>(),
        steals in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut text = format!(
            "name = \"any\"\ncores = {cores}\nmemory = \"{} KiB\"\n{}\npreempt = {preempt}\nrwsem-steals = {steals}\nseconds = 0.02\nwarm-up = 0.0\n[[files]]\nname = \"data\"\nsize = \"8 MiB\"\nread-ahead = {read_ahead}\n[[regions]]\nname = \"heap\"\nsize = \"512 KiB\"\n",
            memory * 4,
            match kind {
                0 => "kswapd = true".to_owned(),
                1 => format!("memory-high = \"{} KiB\"", memory * 3),
                _ => String::new(),
            },
        );
        for (no, (count, steps)) in groups.iter().enumerate() {
            let steps: Vec<&str> = steps.iter().flatten().map(String::as_str).collect();
            text.push_str(&format!("[[threads]]\nname = \"g{no}\"\ncount = {count}\nloop = [{}]\n", steps.join(", ")));
        }
        let w = Workload::parse(&text).expect("a workload");
        let jobs: Vec<(Workload, String)> = DESIGNS.iter().map(|d| (w.clone(), d.id.to_owned())).collect();
        for o in run_all(&jobs, seed, |_| {}).expect("they run") {
            let rounds: f64 = o.groups.iter().map(|g| g.per_second).sum();
            prop_assert!(rounds > 0.0, "{} stands still: {o:?}", o.design);
        }
    }
}
