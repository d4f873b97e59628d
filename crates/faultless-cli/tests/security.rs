//! What a hostile user on the same machine, a child that is trusted less, or crafted input can do: `docs/security.md` has the promises.

mod common;

use common::*;

#[test]
fn a_copy_of_the_process_cannot_act_on_it_however_it_was_made() {
    let program = compile("forge", &[]);
    // Each way, with one thread and beside others that miss.
    for how in (0..=8).chain(10..=18) {
        let how = how.to_string();
        for more in [&[][..], &["--compat"]] {
            let data = scratch().join(format!("forge.{how}.data"));
            let data = data.to_str().expect("a plain path");
            let alone = plain(&program, &[&how, data]);
            assert!(
                alone.status.success(),
                "{how}: {}",
                String::from_utf8_lossy(&alone.stderr)
            );
            let options = [&["--min-size", "1M", "--memory", "64M"], more].concat();
            let served = served(&options, &program, &[&how, data]);
            assert!(served.output.status.success(), "{how}: {}", served.told());
            served.same_as(&alone).taken_over();
        }
    }
}
