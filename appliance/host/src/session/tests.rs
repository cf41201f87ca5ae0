// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use tranship_protocol::GuestPath;

fn hello() -> Hello {
    Hello { version: VERSION, kernel: "6.1".into(), stages: Vec::new(), vmcoreinfo: None }
}

/// A session whose agent is `script`, run on a thread.
fn session(
    script: impl FnOnce(UnixStream, UnixStream) + Send + 'static,
) -> (Session, std::thread::JoinHandle<()>) {
    let (control, mut far_control) = UnixStream::pair().unwrap();
    let (bulk, far_bulk) = UnixStream::pair().unwrap();
    Frame::encode(0, &hello()).unwrap().write_to(&mut far_control).unwrap();
    let thread = std::thread::spawn(move || script(far_control, far_bulk));
    let session = Session::open(control, bulk, CancelToken::default(), &|| None).unwrap();
    (session, thread)
}

fn next(stream: &mut UnixStream) -> Frame {
    Frame::read_from(stream).unwrap().unwrap()
}

#[test]
fn a_download_arrives_in_order_with_credit_given_back() {
    let (session, thread) = session(|mut control, mut bulk| {
        let id = next(&mut control).id;
        for piece in [&b"one "[..], b"two"] {
            let data = Frame { kind: FrameKind::Data, id, body: piece.to_vec() };
            data.write_to(&mut bulk).unwrap();
        }
        Frame { kind: FrameKind::End, id, body: Vec::new() }.write_to(&mut bulk).unwrap();
        Frame::encode(id, &Reply::Bytes(7)).unwrap().write_to(&mut control).unwrap();
        let credits: u64 = (0..2).map(|_| next(&mut control).decode::<Credit>().unwrap().0).sum();
        assert_eq!(credits, 7);
    });
    let mut got = Vec::new();
    let call = Call::Download { path: GuestPath::of("/f") };
    let reply = session
        .download(
            &call,
            &mut |bytes| {
                got.extend_from_slice(bytes);
                Ok(())
            },
            &Silent,
        )
        .unwrap();
    assert_eq!((reply, got.as_slice()), (Reply::Bytes(7), &b"one two"[..]));
    thread.join().unwrap();
}

#[test]
fn an_upload_waits_for_credit() {
    let (session, thread) = session(|mut control, mut bulk| {
        let id = next(&mut control).id;
        for (credit, expected) in [(3, &b"abc"[..]), (10, b"de")] {
            Frame::encode(id, &Credit(credit)).unwrap().write_to(&mut control).unwrap();
            assert_eq!(next(&mut bulk).body, expected);
        }
        assert_eq!(next(&mut bulk).kind, FrameKind::End);
        Frame::encode(id, &Reply::Done).unwrap().write_to(&mut control).unwrap();
    });
    let call = Call::Append { path: GuestPath::of("/f"), align: 4, backup: None };
    assert_eq!(session.upload(&call, &mut &b"abcde"[..], &Silent).unwrap(), Reply::Done);
    thread.join().unwrap();
}

#[test]
fn an_agent_that_floods_is_cut_off() {
    let (session, thread) = session(|mut control, mut bulk| {
        let id = next(&mut control).id;
        let data = Frame { kind: FrameKind::Data, id, body: vec![0; CHUNK] };
        while data.write_to(&mut bulk).is_ok() {}
    });
    let call = Call::Download { path: GuestPath::of("/f") };
    // The first piece blocks the call, so that no credit is given back.
    let error = session
        .download(
            &call,
            &mut |_| {
                std::thread::sleep(Duration::from_millis(300));
                Ok(())
            },
            &Silent,
        )
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    drop(session);
    thread.join().unwrap();
}

#[test]
fn a_failure_has_the_calls_name_and_errno() {
    let (session, thread) = session(|mut control, _bulk| {
        let id = next(&mut control).id;
        let failure = Failure { errno: 2, message: "/f: No such file or directory".into() };
        Frame::encode(id, &failure).unwrap().write_to(&mut control).unwrap();
    });
    let error = session.call(&Call::ReadLink { path: GuestPath::of("/f") }).unwrap_err();
    assert_eq!(error.to_string(), "read_link: /f: No such file or directory");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Call, 2));
    thread.join().unwrap();
}

#[test]
fn the_last_answer_counts_although_the_agent_hangs_up_behind_it() {
    for _ in 0..200 {
        let (session, thread) = session(|mut control, bulk| {
            drop(bulk);
            let id = next(&mut control).id;
            Frame::encode(id, &Reply::Done).unwrap().write_to(&mut control).unwrap();
        });
        assert_eq!(session.call(&Call::Shutdown).unwrap(), Reply::Done);
        thread.join().unwrap();
    }
}

#[test]
fn calls_fail_once_the_agent_is_gone() {
    let (session, thread) = session(|control, bulk| drop((control, bulk)));
    thread.join().unwrap();
    for _ in 0..2 {
        assert_eq!(session.call(&Call::Ping).unwrap_err().kind(), ErrorKind::Lost);
    }
}

#[test]
fn nonsense_ends_the_session() {
    let (session, thread) = session(|mut control, _bulk| {
        next(&mut control);
        Frame { kind: FrameKind::Call, id: 1, body: Vec::new() }.write_to(&mut control).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    });
    let error = session.call(&Call::Ping).unwrap_err();
    assert!(error.to_string().contains("unexpected Call"), "{error}");
    thread.join().unwrap();
}

#[derive(Debug)]
struct Solid;

impl Ground for Solid {
    fn ended(&self) -> Option<String> {
        None
    }

    fn explain(&self, cause: &Cause) -> Loss {
        Loss { remedy: Some("look".into()), ..Loss::new(cause.words()) }
    }
}

const SHORT: Patience =
    Patience { quiet: Duration::from_millis(60), answer: Duration::from_millis(200) };

#[test]
fn a_call_may_take_long_if_the_agent_says_that_it_is_there() {
    let (session, thread) = session(|mut control, _bulk| {
        let id = next(&mut control).id;
        for _ in 0..5 {
            let ping = next(&mut control);
            assert_eq!(ping.decode::<Call>().unwrap(), Call::Ping);
            Frame::encode(ping.id, &Reply::Done).unwrap().write_to(&mut control).unwrap();
        }
        Frame::encode(id, &Reply::Bytes(1)).unwrap().write_to(&mut control).unwrap();
    });
    // A busy host may take its time.
    let patience = Patience { answer: Duration::from_secs(20), ..SHORT };
    session.watch(patience, Arc::new(Solid)).unwrap();
    assert_eq!(session.call(&Call::Sync).unwrap(), Reply::Bytes(1));
    thread.join().unwrap();
}

#[test]
fn every_call_fails_when_the_agent_says_nothing_any_more() {
    let (session, thread) =
        session(|mut control, _bulk| while control.read(&mut [0]).is_ok_and(|n| n > 0) {});
    session.watch(SHORT, Arc::new(Solid)).unwrap();
    std::thread::scope(|scope| {
        let calls = [Call::Sync, Call::Mounts].map(|call| {
            let session = &session;
            scope.spawn(move || session.call(&call).unwrap_err())
        });
        for (call, name) in calls.into_iter().zip(["sync", "mounts"]) {
            let error = call.join().unwrap();
            let text = error.to_string();
            assert!(text.starts_with(&format!("{name}: the appliance has hung: not")), "{text}");
            assert!(text.contains("sync for ") && text.contains("mounts for "), "{text}");
            assert_eq!((error.kind(), error.remedy()), (ErrorKind::Lost, Some("look")));
        }
    });
    thread.join().unwrap();
}

#[test]
fn an_upload_that_nobody_reads_does_not_hang() {
    let (session, thread) = session(|mut control, bulk| {
        let id = next(&mut control).id;
        Frame::encode(id, &Credit(1 << 40)).unwrap().write_to(&mut control).unwrap();
        while control.read(&mut [0]).is_ok_and(|count| count > 0) {}
        drop(bulk);
    });
    session.watch(SHORT, Arc::new(Solid)).unwrap();
    let call = Call::Append { path: GuestPath::of("/f"), align: 4, backup: None };
    let error = session.upload(&call, &mut std::io::repeat(7), &Silent).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    thread.join().unwrap();
}

#[test]
fn a_machine_that_stands_still_is_waited_for() {
    let (session, thread) = session(|mut control, _bulk| {
        let id = next(&mut control).id;
        std::thread::sleep(Duration::from_millis(600));
        Frame::encode(id, &Reply::Done).unwrap().write_to(&mut control).unwrap();
    });
    session.watch(SHORT, Arc::new(Solid)).unwrap();
    session.standing_still(|| assert_eq!(session.call(&Call::Sync).unwrap(), Reply::Done));
    thread.join().unwrap();
}

#[test]
fn an_answer_that_is_late_for_its_limit_names_the_call() {
    let (session, thread) =
        session(|mut control, _bulk| while control.read(&mut [0]).is_ok_and(|n| n > 0) {});
    let error = session.call_within(&Call::Prepare, Duration::from_millis(10)).unwrap_err();
    assert_eq!(error.to_string(), "prepare: the appliance did not answer in time");
    drop(session);
    thread.join().unwrap();
}

#[test]
fn a_call_that_was_given_up_leaves_no_question_behind() {
    let (session, thread) = session(|mut control, _bulk| {
        next(&mut control);
        // The question about the first call stays open; the second call is answered.
        loop {
            let frame = next(&mut control);
            if frame.decode::<Call>().is_ok_and(|call| call == Call::Mounts) {
                std::thread::sleep(Duration::from_millis(30));
                return Frame::encode(frame.id, &Reply::Done)
                    .unwrap()
                    .write_to(&mut control)
                    .unwrap();
            }
        }
    });
    session.watch(SHORT, Arc::new(Solid)).unwrap();
    session.call_within(&Call::Sync, Duration::from_millis(150)).unwrap_err();
    std::thread::sleep(Duration::from_millis(250));
    assert_eq!(session.call(&Call::Mounts).unwrap(), Reply::Done);
    thread.join().unwrap();
}
