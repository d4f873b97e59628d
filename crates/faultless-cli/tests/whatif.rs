//! `faultless whatif`, by what it prints.

mod common;

use common::{FAULTLESS, scratch};
use faultless_trace::{
    CAUSES, Cause, Doing, Event, Fault, File, FileNo, Header, Hold, LockId, Thread, Writer,
};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn whatif(args: &[&str]) -> Output {
    Command::new("timeout")
        .args(["--signal=KILL", "300", FAULTLESS, "whatif"])
        .args(args)
        .output()
        .expect("it starts")
}

fn text(args: &[&str]) -> String {
    let out = whatif(args);
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {err}");
    assert_eq!(err, "", "{args:?} in a pipe shows no progress");
    String::from_utf8(out.stdout).expect("Unicode")
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&text(args)).expect("JSON")
}

fn fails(args: &[&str], status: i32, says: &str) -> String {
    let out = whatif(args);
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(status), "{args:?}: {err}");
    assert!(err.contains(says), "{args:?}: {err}");
    assert!(out.stdout.is_empty(), "{args:?}");
    assert!(!err.contains("panicked"), "{args:?}: {err}");
    err.trim_end().to_owned()
}

#[test]
fn a_comparison_in_words_as_json_and_as_a_page() {
    let page = scratch().join("whatif.html");
    let _ = std::fs::remove_file(&page);
    let path = page.to_str().expect("Unicode");
    let args = ["churn", "--seconds", "0.2", "--sweep", "threads=1..4"];
    let words = text(&args);
    assert!(
        words.contains("best") && words.contains("vma-hold"),
        "{words}"
    );
    assert!(
        words.contains("The longest wait for mmap_lock, and what it was behind"),
        "{words}"
    );
    let with = |more: &[&'static str]| [&args[..], more].concat();
    let c = json(&with(&["--json"]));
    assert_eq!(c["schema"], "faultless.whatif/1");
    assert_eq!(c["outcomes"].as_array().map(Vec::len), Some(12));
    assert_eq!(c["points"].as_array().map(Vec::len), Some(3));
    assert!(words.contains(c["verdict"].as_str().expect("a verdict")));
    // The same seed, the same bytes; whatever ran beside it.
    assert_eq!(text(&with(&["--json"])), text(&with(&["--json"])));
    assert_ne!(
        json(&with(&["--json", "--seed", "2"]))["outcomes"],
        c["outcomes"]
    );
    text(&[&args[..], &["--html", path]].concat());
    let written = std::fs::read_to_string(&page).expect("a page");
    assert!(written.contains("<svg") && written.ends_with("</html>\n"));
    // Self-contained: the name of SVG's space is all that looks like an address.
    let rest = written.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for outside in ["http:", "https:", "src=", "<link", "url(", "@import"] {
        assert!(!rest.contains(outside), "{outside}");
    }
}

#[test]
fn a_printed_workload_is_a_workload_and_a_machine_is_put_under_it() {
    let file = scratch().join("printed.toml");
    std::fs::write(&file, text(&["quiet", "--print"])).expect("writable");
    let path = file.to_str().expect("Unicode");
    let args = ["--design", "vma-then-mmap", "--seconds", "0.1", "--json"];
    let of = |name: &str| json(&[&[name][..], &args[..]].concat())["outcomes"][0]["groups"].clone();
    assert_eq!(of("quiet"), of(path));
    let machine = scratch().join("machine.toml");
    std::fs::write(
        &machine,
        "cores = 4\n[device]\nlatency-us = [[1, 1000.0]]\nscatter = 0.0\n[costs]\nfault = 100\n",
    )
    .expect("writable");
    let slow = json(&[
        "quiet",
        "--machine",
        machine.to_str().expect("Unicode"),
        "--seconds",
        "0.2",
        "--json",
    ]);
    assert_eq!(slow["workload"]["cores"], 4);
    // 16 threads, each a read of a millisecond at a time.
    let rate = slow["outcomes"][0]["groups"][0]["per_second"]
        .as_f64()
        .expect("a rate");
    assert!((13_000.0..16_100.0).contains(&rate), "{rate}");
}

#[test]
fn lists_and_the_table_of_all() {
    let list = text(&["--list"]);
    for name in [
        "churn",
        "memcg-thrash",
        "swap-in",
        "retry-hard",
        "faultless",
    ] {
        assert!(list.contains(name), "{list}");
    }
    let costs = text(&["--costs"]);
    assert!(
        costs.contains("zero-page") && costs.contains("measured"),
        "{costs}"
    );
    let all = json(&[
        "all",
        "--design",
        "vma-then-mmap,vma-retry",
        "--seconds",
        "0.02",
        "--json",
    ]);
    assert_eq!(all["schema"], "faultless.whatif/1");
    assert_eq!(all["outcomes"].as_array().map(Vec::len), Some(2 * 10));
}

/// A trace of two threads: one faults on a file, the other one maps, for so many times.
fn trace(path: &Path, times: u64) {
    const MS: u64 = 1_000_000;
    let file = std::fs::File::create(path).expect("writable");
    let header = Header {
        processors: 2,
        ..Header::default()
    };
    let mut w = Writer::new(file, &header).expect("a header");
    for (tid, name) in [(100, "server"), (101, "reader"), (102, "mapper")] {
        let thread = Thread {
            at: 0,
            tid,
            pid: 100,
            name: name.to_owned(),
        };
        w.write(&Event::Thread(thread)).expect("written");
    }
    let data = File {
        no: FileNo(1),
        device: 1,
        inode: 2,
        magic: 0xef53,
        path: "/data".to_owned(),
    };
    w.write(&Event::File(data)).expect("written");
    for i in 0..times {
        let at = i * 10 * MS;
        let mut causes = [0; CAUSES];
        causes[Cause::Device as usize] = 2 * MS;
        let fault = Fault {
            at: at + MS,
            took: 3 * MS,
            tid: 101,
            pid: 100,
            address: 0x7000_0000 + i * 4096,
            ip: 0x40_0000,
            major: true,
            file: Some(FileNo(1)),
            page: i,
            gone: false,
            locked: true,
            write: false,
            kernel: false,
            open: false,
            first: 2 * MS,
            wait: 0,
            retry: MS,
            retry_asleep: 0,
            causes,
            stack: None,
        };
        w.write(&Event::Fault(fault)).expect("written");
        let hold = Hold {
            at: at + 2 * MS,
            took: MS,
            lock: LockId(1),
            target: 100,
            tid: 102,
            pid: 100,
            write: true,
            downgraded: false,
            contended: false,
            open: false,
            doing: Doing::Call(9),
            address: 0,
            length: 4096,
            file: None,
            page: 0,
            causes: [0; CAUSES],
            longest_sleep: 0,
            stack: None,
            reads: String::new(),
            kept_by: None,
        };
        w.write(&Event::Hold(hold)).expect("written");
    }
    w.finish().expect("written");
}

#[test]
fn a_trace_is_replayed_under_every_design() {
    let path = scratch().join("whatif.trace");
    trace(&path, 50);
    let c = json(&[path.to_str().expect("Unicode"), "--json"]);
    assert_eq!(c["workload"]["cores"], 2);
    let recorded = c["recorded"]["groups"].as_array().expect("groups");
    let reader = recorded.iter().find(|g| g["name"] == "reader").expect("it");
    assert_eq!(reader["threads"], 1);
    for o in c["outcomes"].as_array().expect("outcomes") {
        let groups = o["groups"].as_array().expect("groups");
        let group = |name: &str| groups.iter().find(|g| g["name"] == name).expect("it");
        // All 50 faults are taken, each of which reads for 2 ms, and all 50 holds had.
        let seconds = o["seconds"].as_f64().expect("seconds");
        for name in ["reader", "mapper"] {
            let rounds = group(name)["per_second"].as_f64().expect("a rate") * seconds;
            assert!(
                (rounds - 50.0).abs() < 0.5,
                "{name}: {rounds} under {}",
                o["design"]
            );
        }
        let p50 = group("reader")["fault_us"]["p50"].as_f64().expect("a time");
        assert!(
            (2_000.0..3_500.0).contains(&p50),
            "{p50} under {}",
            o["design"]
        );
    }
}

/// What the model says of each published figure, about, and whether that is close enough: docs/whatif.md has the same. Who changes
/// the model changes that.
#[test]
fn what_is_published_is_predicted_as_the_docs_have_it() {
    let all = json(&["published", "--json"])["predictions"].clone();
    let all = all.as_array().expect("predictions");
    let expected = [
        ("loop-2010", 450.0..650.0, false),
        ("memcg-thrash", 1.2..1.8, false),
        ("memcg-thrash", 0.0..5.0, false),
        ("memcg-thrash", 0.0..2.0, true),
        ("app-start", -86.2..-60.0, false),
        ("app-start", -65.0..-20.0, false),
        ("swap-in", 0.8..1.05, false),
        ("slow-fault", 20.0..200.0, true),
    ];
    assert_eq!(all.len(), expected.len());
    for (p, (workload, about, holds)) in all.iter().zip(expected) {
        assert_eq!(p["workload"], workload);
        let predicted = p["predicted"].as_f64().expect("a number");
        assert!(about.contains(&predicted), "{p:#}");
        let close = p["holds"] == true;
        // Of what is near a bound chance decides.
        let is_near = (1.5..1.56).contains(&predicted);
        assert!(close == holds || is_near, "{p:#}");
        assert!(close || p["why_not"].as_str().is_some_and(|w| !w.is_empty()));
    }
}

#[test]
fn what_cannot_be_done_is_said_in_a_sentence() {
    fails(
        &["nothing-like-it"],
        2,
        "there is no workload and no file nothing-like-it",
    );
    fails(
        &["churn", "--design", "magic"],
        2,
        "there is no design magic",
    );
    fails(
        &["churn", "--sweep", "speed=1..4"],
        2,
        "there is no speed to sweep",
    );
    fails(&["all", "--sweep", "threads=1..4"], 2, "for one of them");
    let file = scratch().join("wrong.toml");
    std::fs::write(&file, "name = \"x\"\nthreads = []\n").expect("writable");
    fails(&[file.to_str().expect("Unicode")], 1, "0 threads");
    std::fs::write(&file, "name = \"x\"\nthread = []\n").expect("writable");
    fails(&[file.to_str().expect("Unicode")], 1, "thread");
    let trace_path = scratch().join("empty.trace");
    trace(&trace_path, 0);
    fails(
        &[trace_path.to_str().expect("Unicode")],
        1,
        "no faults and no holds of mmap_lock",
    );
    fails(&["validate", "--threads", "0"], 2, "--threads");
    fails(&["--list", "--json"], 2, "--json");
    let wrong = |text: &str| {
        std::fs::write(&file, text).expect("writable");
        file.to_str().expect("Unicode").to_owned()
    };
    fails(&["churn", "--print", "--html", "x.html"], 2, "--html");
    let said = fails(&[wrong("cores = 2\nname = 1").as_str()], 1, "line 2");
    assert_eq!(said.lines().count(), 1, "{said}");
    let of = |more: &str| {
        wrong(&format!(
            "name = \"x\"\n{more}\n[[threads]]\nname = \"a\"\nloop = [{{ work-us = 5.0 }}]\n"
        ))
    };
    let lost = of("[[regions]]\nname = \"heap\"\nsize = \"1 GiB\"\nprocess = \"nobody\"");
    fails(&[lost.as_str()], 1, "nobody");
    fails(&[of("memory = \"0 B\"").as_str()], 1, "memory = 0");
    fails(&[of("[device]\nper-second = 1e-10").as_str()], 1, "0.001");
    fails(
        &[of("[device]\nspread = [[1, []]]").as_str()],
        1,
        "device.spread",
    );
    fails(&["validate", "--scenario", "noise"], 2, "noise");
}

/// Small, and of no worth as a measurement: that it measures, predicts, and says both.
#[test]
fn a_machine_is_calibrated_and_the_model_validated_on_it() {
    let data = scratch().join("whatif.data");
    let data = data.to_str().expect("Unicode");
    let machine = text(&["calibrate", "--file", data, "--size", "64M"]);
    assert!(
        machine.contains("latency-us") && machine.contains("zero-page"),
        "{machine}"
    );
    let file = scratch().join("calibrated.toml");
    std::fs::write(&file, &machine).expect("writable");
    let v = json(&[
        "validate",
        "--file",
        data,
        "--size",
        "64M",
        "--machine",
        file.to_str().expect("Unicode"),
        "--threads",
        "2",
        "--seconds",
        "0.1",
        "--rounds",
        "1",
        "--scenario",
        "quiet,churn",
        "--json",
    ]);
    let settings = v["settings"].as_array().expect("settings");
    assert_eq!(settings.len(), 6);
    for s in settings {
        assert_eq!(s["machine"], 0);
        for figure in [
            "measured_per_s",
            "predicted_per_s",
            "measured_p99_us",
            "predicted_p99_us",
        ] {
            assert!(s[figure].as_f64().is_some_and(|f| f > 0.0), "{s:#}");
        }
    }
    // Calibrated beside what is measured; kept, and predicted again.
    let kept = scratch().join("kept.json");
    let path = kept.to_str().expect("Unicode");
    let measured = ["--file", data, "--size", "64M", "--threads", "2,2,1"];
    let more = [
        "--rounds",
        "2",
        "--seconds",
        "0.1",
        "--scenario",
        "quiet",
        "--json",
    ];
    let v = json(&[&["validate", "--keep", path], &measured[..], &more[..]].concat());
    assert_eq!(v["settings"].as_array().map(Vec::len), Some(6));
    assert_eq!(v["machines"].as_array().map(Vec::len), Some(2));
    let again = json(&["validate", "--from", path, "--json"]);
    assert_eq!(again["settings"], v["settings"]);
    fails(
        &["validate", "--from", path, "--threads", "4"],
        2,
        "--threads",
    );
    std::fs::write(&kept, "{").expect("writable");
    fails(
        &["validate", "--from", path],
        1,
        "is not what validate --json prints",
    );
    let lost = "{\"machines\": [], \"settings\": [{\"scenario\": \"quiet\"}]}";
    std::fs::write(&kept, lost).expect("writable");
    fails(&["validate", "--from", path], 1, "no machine 0");
    let nowhere = scratch().join("no/such/place.json");
    let nowhere = nowhere.to_str().expect("Unicode");
    fails(
        &["validate", "--keep", nowhere, "--threads", "1"],
        1,
        "cannot write",
    );
}
