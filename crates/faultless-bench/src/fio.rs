//! fio, where it is installed: its figures can be compared with those of other machines. It reads at random, with `O_DIRECT` and io_uring,
//! in a process of its own. It chooses the pages itself, so it may read a page twice, or one that a later contender reads too; and nothing checks
//! their bytes, since fio does not know what is in the file. Its processor time is by its own account, which cuts each thread's to milliseconds.

use crate::cell::{Measured, QUANTILES, Setting};
use anyhow::Context;
use faultless_sys::mem::PAGE;
use faultless_untrusted::printable;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::process::{Command, Stdio};

/// Whether there is a fio that was built with io_uring.
pub fn is_installed() -> bool {
    let mut command = Command::new("fio");
    let command = command.arg("--enghelp=io_uring").stdin(Stdio::null());
    command.output().is_ok_and(|out| out.status.success())
}

/// The quantiles for which fio is asked: all but the least and the most, which it prints anyway.
fn inner() -> &'static [f64] {
    &QUANTILES[1..QUANTILES.len() - 1]
}

/// What fio prints, as far as it is used.
#[derive(Debug, Deserialize)]
struct Printed {
    jobs: Vec<Job>,
}

/// The sum of all threads.
#[derive(Debug, Deserialize)]
struct Job {
    error: i64,
    read: Reads,
    /// Of all threads together, in milliseconds; and shares of that, in percent.
    job_runtime: f64,
    usr_cpu: f64,
    sys_cpu: f64,
}

#[derive(Debug, Deserialize)]
struct Reads {
    io_bytes: u64,
    total_ios: u64,
    /// In milliseconds.
    runtime: f64,
    lat_ns: Latency,
}

/// How long a read took, its submission included, in nanoseconds.
#[derive(Debug, Deserialize)]
struct Latency {
    min: f64,
    max: f64,
    #[serde(default)]
    percentile: BTreeMap<String, f64>,
}

/// Runs fio for one measurement.
pub(crate) fn run(setting: &Setting) -> anyhow::Result<Measured> {
    let percentiles: Vec<String> = inner().iter().map(|q| format!("{}", q * 100.0)).collect();
    // A link with a plain name, in its directory: colons and other characters of a name have a meaning for fio.
    let dir = crate::private_dir().context("cannot make a directory for fio")?;
    let link = dir.path().join("data");
    std::fs::canonicalize(&setting.file)
        .and_then(|file| std::os::unix::fs::symlink(file, &link))
        .with_context(|| format!("cannot make a link to {}", printable(&setting.file)))?;
    let out = Command::new("fio")
        .args([
            "--name=faultless",
            "--readonly",
            "--rw=randread",
            "--direct=1",
        ])
        .args([
            "--ioengine=io_uring",
            "--thread",
            "--group_reporting",
            "--time_based",
        ])
        .args([
            "--randrepeat=0",
            "--allow_file_create=0",
            "--output-format=json",
        ])
        .current_dir(dir.path())
        .arg("--filename=data")
        .args(["--lat_percentiles=1", "--clat_percentiles=0"])
        .arg(format!(
            "--size={}",
            setting.size / PAGE as u64 * PAGE as u64
        ))
        .arg(format!("--bs={PAGE}"))
        .arg(format!("--iodepth={}", setting.depth))
        .arg(format!("--numjobs={}", setting.threads))
        .arg(format!("--runtime={}ms", (setting.seconds * 1e3) as u64))
        .arg(format!(
            "--ramp_time={}ms",
            (setting.warm_seconds * 1e3) as u64
        ))
        .arg(format!("--percentile_list={}", percentiles.join(":")))
        .stdin(Stdio::null())
        .output()
        .context("cannot start fio")?;
    let text = String::from_utf8_lossy(&out.stdout);
    let said = String::from_utf8_lossy(&out.stderr);
    anyhow::ensure!(
        out.status.success(),
        "fio ended with {}: {}",
        out.status,
        printable(said.trim().lines().next_back().unwrap_or_default())
    );
    measured(&text)
}

fn measured(text: &str) -> anyhow::Result<Measured> {
    // (Warnings may stand before it.)
    let start = text.find('{').context("fio printed no JSON")?;
    let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter();
    let printed: Printed = values
        .next()
        .context("fio printed no JSON")?
        .context("fio's JSON is not as expected")?;
    let [job] = &printed.jobs[..] else {
        anyhow::bail!(
            "fio tells of {} groups of threads, and one was asked for",
            printed.jobs.len()
        );
    };
    anyhow::ensure!(
        job.error == 0,
        "a read of fio's failed with error {}",
        job.error
    );
    let read = &job.read;
    anyhow::ensure!(read.total_ios > 0, "fio read nothing");
    let us = |q: f64| {
        let name = format!("{:.6}", q * 100.0);
        let ns = read.lat_ns.percentile.get(&name)?;
        // (Each is the middle of a range of times, which may lie beyond the longest.)
        Some(ns.min(read.lat_ns.max).max(read.lat_ns.min) / 1e3)
    };
    let mut latency_us = vec![read.lat_ns.min / 1e3];
    for &q in inner() {
        latency_us
            .push(us(q).with_context(|| format!("fio left out the percentile {}", q * 100.0))?);
    }
    latency_us.push(read.lat_ns.max / 1e3);
    let at = |q: f64| {
        let place = QUANTILES.iter().position(|&other| other == q);
        place.map_or(0.0, |i| latency_us[i])
    };
    Ok(Measured {
        seconds: read.runtime / 1e3,
        reads: read.total_ios,
        misses: read.total_ios,
        p50_us: at(0.5),
        p99_us: at(0.99),
        p999_us: at(0.999),
        max_us: at(1.0),
        device_bytes: read.io_bytes,
        cpu_s: (job.usr_cpu + job.sys_cpu) / 100.0 * job.job_runtime / 1e3,
        latency_us,
        ..Measured::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fio_prints_is_understood_and_what_it_does_not_print_is_an_error() {
        let percentiles: Vec<String> = inner()
            .iter()
            .map(|q| format!("\"{:.6}\": {}", q * 100.0, q * 1e7))
            .collect();
        let text = format!(
            "fio: a note\n{{\"fio version\": \"fio-3.33\", \"jobs\": [{{\"error\": 0, \"job_runtime\": 4000, \"usr_cpu\": 5.0, \
             \"sys_cpu\": 20.0, \"read\": {{\"io_bytes\": 40960, \"total_ios\": 10, \"runtime\": 500, \
             \"lat_ns\": {{\"min\": 1000, \"max\": 9998000, \"percentile\": {{{}}}}}}}}}]}} and more",
            percentiles.join(", ")
        );
        let m = measured(&text).expect("understood");
        assert_eq!((m.reads, m.device_bytes, m.seconds), (10, 40960, 0.5));
        assert_eq!((m.p50_us, m.max_us, m.cpu_s), (5_000.0, 9_998.0, 1.0));
        assert!(m.latency_us.is_sorted());
        assert_eq!(m.latency_us.len(), QUANTILES.len());
        let error = |text: &str| measured(text).expect_err("refused").to_string();
        assert!(error("nothing").contains("no JSON"));
        assert!(error(&text.replace("\"error\": 0", "\"error\": 5")).contains("error 5"));
        assert!(error(&text.replace("99.990000", "99.980000")).contains("99.99"));
    }

    #[test]
    fn fio_takes_the_arguments_that_it_is_given() {
        let permitted = io_uring::IoUring::new(2)
            .map(drop)
            .map_err(|e| e.to_string());
        let installed = is_installed()
            .then_some(())
            .ok_or("fio is not installed".to_owned());
        if let Err(why) = installed.and(permitted) {
            let line = format!("NOT RUN: fio_takes_the_arguments_that_it_is_given: {why}\n");
            // (Directly: the test harness keeps what goes through the print macros.)
            faultless_sys::raw::write_stderr(line.as_bytes());
            return;
        }
        let dir = tempfile::tempdir_in(".").expect("a directory");
        let file = dir.path().join("a: #b;");
        std::fs::write(&file, vec![1; 1 << 20]).expect("written");
        let setting = Setting {
            scenario: crate::scenario::Scenario::Reads,
            threads: 2,
            depth: 4,
            seconds: 0.05,
            warm_seconds: 0.0,
            parts: 1,
            file,
            size: 1 << 20,
            memory: 0,
            memory_over: 0,
            group_memory: None,
            lowered: None,
        };
        let m = run(&setting).expect("measured");
        assert!(m.reads > 0 && m.cpu_s >= 0.0, "{m:?}");
        assert_eq!(m.device_bytes, m.reads * PAGE as u64);
        assert!(m.latency_us.is_sorted(), "{:?}", m.latency_us);
    }
}
