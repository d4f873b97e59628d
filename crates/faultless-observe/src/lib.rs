//! Watches.
mod raw;
mod privilege;
#[cfg(have_bpf)]
mod session;
#[cfg(have_bpf)]
#[test]
fn it_loads() {
    use std::time::Duration;
    let s = session::Session::start(session::Settings{every_fault:true,follow_children:true,wait_min:Duration::from_micros(20),hold_min:Duration::from_millis(1)}).unwrap();
    println!("missing {:?}", s.missing);
    let pid = std::env::var("PIDX").map_or(std::process::id(), |p| p.parse().unwrap());
    s.watch(pid, 1).unwrap();
    let t0=std::time::Instant::now();
    let mut n=[0;8];
    while t0.elapsed() < Duration::from_secs(3) {
        for r in s.records(Duration::from_millis(20)) { 
            let k = match &r { raw::Raw::File(f) => {println!("{:?}", f.part.iter().take(f.parts as usize).map(|p| raw::text(p)).collect::<Vec<_>>()); 1}, raw::Raw::Task(_)=>2, raw::Raw::Fault(f)=>{ if n[3]<3 {println!("{f:?}")}; 3}, raw::Raw::Wait(f)=>{ if n[4]<3 {println!("{f:?}")};4}, raw::Raw::Hold(f)=>{ if n[5]<3 {println!("{f:?}")};5}, raw::Raw::Stray(f)=>{ if n[6]<3 {println!("{f:?}")};6}, raw::Raw::Io(f)=>{ if n[7]<3 {println!("{f:?}")};7}};
            n[k]+=1; }
    }
    println!("{n:?} {:?} going on {}", s.losses(), s.going_on().len());
    s.tallies(|k,v| println!("{k:?} {v:?}"));
}
