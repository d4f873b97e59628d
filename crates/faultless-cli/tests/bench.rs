//! `faultless bench`: what it leaves behind.

mod common;

use common::{FAULTLESS, possible};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn bench(temporary: &Path, seconds: &str) -> Command {
    let mut bench = Command::new(FAULTLESS);
    bench
        .args(["bench", "quiet", "--storage", "fast", "--size", "64M"])
        .args(["--threads", "2", "--rounds", "1", "--json"])
        .args(["--contenders", "mmap,faultless", "--seconds", seconds])
        .env("TMPDIR", temporary)
        .stdin(Stdio::null());
    bench
}

/// The devices that a process sees mounted beneath a directory.
fn mounted(process: &str, temporary: &Path) -> Vec<String> {
    let mounts = std::fs::read_to_string(format!("/proc/{process}/mounts")).unwrap_or_default();
    let beneath = temporary.to_str().expect("a plain path");
    let fields = |line: &str| {
        let mut fields = line.split(' ');
        Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
    };
    let mounts = mounts.lines().filter_map(fields);
    mounts
        .filter(|(_, at)| at.starts_with(beneath))
        .map(|(device, _)| device)
        .collect()
}

fn exists(device: &str) -> bool {
    Path::new(&device.replace("/dev/", "/sys/block/")).exists()
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(120), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn fast_storage_is_taken_down_on_every_exit() {
    let name = "fast_storage_is_taken_down_on_every_exit";
    let control = std::fs::File::options()
        .write(true)
        .open("/sys/class/zram-control/hot_remove");
    let needs = |e| format!("zram devices cannot be made (root, CONFIG_ZRAM): {e}");
    if !possible(name, control.map(drop).map_err(needs)) {
        return;
    }
    let temporary = tempfile::tempdir().expect("a directory");
    let output = bench(temporary.path(), "0.1").output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(text.contains("ext4 on /dev/zram"), "{text}");
    let left = || std::fs::read_dir(temporary.path()).expect("ours").count();
    let device = text.split("ext4 on ").nth(1).expect("checked");
    let device = device.split([' ', '"']).next().expect("a word");
    assert!(!exists(device), "{device}");
    assert_eq!(left(), 0);

    let mut killed = bench(temporary.path(), "1000")
        .stdout(Stdio::null())
        .spawn()
        .expect("it starts");
    let process = killed.id().to_string();
    let mut device = String::new();
    eventually("it is mounted", || {
        device = mounted(&process, temporary.path())
            .pop()
            .unwrap_or_default();
        !device.is_empty()
    });
    assert!(exists(&device));
    assert!(mounted("self", temporary.path()).is_empty(), "apart");
    killed.kill().expect("ours");
    killed.wait().expect("ours");
    eventually("it is taken down", || !exists(&device) && left() == 0);
}
