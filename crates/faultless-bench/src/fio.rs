//! fio, where it is installed: what a tool that others know says of the same storage. It reads at random with `O_DIRECT` and io_uring, as
//! [`Uring`](crate::deep::Uring) does, in a process of its own. Its bytes are checked by nobody: fio does not know what is in the file.

use crate::cell::{Measured, QUANTILES, Setting};
use anyhow::Context;
use faultless_sys::mem::PAGE;
use faultless_untrusted::printable;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::process::{Command, Stdio};

/// Whether there is a program of that name.
pub fn is_installed() -> bool {
    let mut command = Command::new("fio");
    let command = command.arg("--version").stdin(Stdio::null());
    command.output().is_ok_and(|out| out.status.success())
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
    lat_ns: Span,
    clat_ns: Percentiles,
}

#[derive(Debug, Deserialize)]
struct Span {
    min: f64,
    max: f64,
}

#[derive(Debug, Deserialize)]
struct Percentiles {
    #[serde(default)]
    percentile: BTreeMap<String, f64>,
}

/// Runs it for one measurement.
pub(crate) fn run(setting: &Setting) -> anyhow::Result<Measured> {
    let inner = &QUANTILES[1..QUANTILES.len() - 1];
    let percentiles: Vec<String> = inner.iter().map(|q| format!("{}", q * 100.0)).collect();
    // (A colon separates file names.)
    let mut file = std::ffi::OsString::from("--filename=");
    for (i, part) in setting.file.to_string_lossy().split(':').enumerate() {
        file.push(if i > 0 { "\\:" } else { "" });
        file.push(part);
    }
    anyhow::ensure!(
        setting.file.to_str().is_some(),
        "fio cannot be told the name {}: it is not UTF-8",
        printable(&setting.file)
    );
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
        .arg(file)
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
    anyhow::ensure!(
        out.status.success(),
        "fio ended with {}: {}",
        out.status,
        printable(String::from_utf8_lossy(&out.stderr).trim())
    );
    measured(&text)
}

fn measured(text: &str) -> anyhow::Result<Measured> {
    // (Warnings may stand before it.)
    let start = text.find('{').context("fio printed no JSON")?;
    let printed: Printed =
        serde_json::from_str(&text[start..]).context("fio's JSON is not as expected")?;
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
        read.clat_ns.percentile.get(&name).map(|ns| ns / 1e3)
    };
    let mut latency_us = vec![read.lat_ns.min / 1e3];
    for &q in &QUANTILES[1..QUANTILES.len() - 1] {
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
        let percentiles: Vec<String> = QUANTILES[1..QUANTILES.len() - 1]
            .iter()
            .map(|q| format!("\"{:.6}\": {}", q * 100.0, q * 1e5))
            .collect();
        let text = format!(
            "fio: a note\n{{\"fio version\": \"fio-3.33\", \"jobs\": [{{\"error\": 0, \"job_runtime\": 4000, \"usr_cpu\": 5.0, \
             \"sys_cpu\": 20.0, \"read\": {{\"io_bytes\": 40960, \"total_ios\": 10, \"runtime\": 500, \
             \"lat_ns\": {{\"min\": 1000, \"max\": 200000}}, \"clat_ns\": {{\"percentile\": {{{}}}}}}}}}]}}",
            percentiles.join(", ")
        );
        let m = measured(&text).expect("understood");
        assert_eq!((m.reads, m.device_bytes, m.seconds), (10, 40960, 0.5));
        assert_eq!((m.p50_us, m.max_us, m.cpu_s), (50.0, 200.0, 1.0));
        assert_eq!(m.latency_us.len(), QUANTILES.len());
        let error = |text: &str| measured(text).expect_err("refused").to_string();
        assert!(error("nothing").contains("no JSON"));
        assert!(error(&text.replace("\"error\": 0", "\"error\": 5")).contains("error 5"));
        assert!(error(&text.replace("99.990000", "99.980000")).contains("99.99"));
    }
}
