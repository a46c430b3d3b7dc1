//! The account that a running pattern keeps, shared by the thread that does I/O and by whoever asks: a lock is held for moments only, so a
//! report is had while an operation hangs.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{Failure, KEPT, Mismatch, Operation, Outage, Outstanding, Report, Shape};

pub(super) struct Account {
    start: Instant,
    report: Mutex<Report>,
}

impl Account {
    pub(super) fn new(device: String, shape: Shape) -> Account {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, micros);
        let report = Report {
            device,
            shape,
            started_unix_us: unix,
            now_us: 0,
            generation: 0,
            writes: 0,
            reads: 0,
            verified: 0,
            mismatch_count: 0,
            mismatches: Vec::new(),
            error_count: 0,
            errors: Vec::new(),
            outage_count: 0,
            outages: Vec::new(),
            working: true,
            longest_pause_us: 0,
            longest_pause_at_us: 0,
            last_success_us: 0,
            outstanding: None,
        };
        Account { start: Instant::now(), report: Mutex::new(report) }
    }

    pub(super) fn report(&self) -> Report {
        let now = self.now();
        Report { now_us: now, ..self.lock().clone() }
    }

    pub(super) fn generation(&self, generation: u64) {
        self.lock().generation = generation;
    }

    /// Does an operation and accounts for it. `waited` is what the rate made it wait since the last one.
    pub(super) fn operation<T>(
        &self,
        operation: Operation,
        offset: u64,
        waited: Duration,
        act: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        self.lock().outstanding = Some(Outstanding { operation, offset, since_us: self.now() });
        let done = act();
        let now = self.now();
        let mut report = self.lock();
        report.outstanding = None;
        match &done {
            Ok(_) => succeeded(&mut report, operation, now, micros(waited)),
            Err(error) => {
                failed(&mut report, Failure { operation, errno: error.raw_os_error(), offset, at_us: now })
            }
        }
        done
    }

    pub(super) fn verified(&self) {
        self.lock().verified += 1;
    }

    pub(super) fn mismatch(&self, offset: u64, expected: u64, found: String) {
        let at_us = self.now();
        let mut report = self.lock();
        report.mismatch_count += 1;
        keep(&mut report.mismatches, Mismatch { offset, expected: Some(expected), found, at_us });
    }

    fn now(&self) -> u64 {
        micros(self.start.elapsed())
    }

    /// Each change is whole before anything can panic.
    fn lock(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn succeeded(report: &mut Report, operation: Operation, now: u64, waited: u64) {
    match operation {
        Operation::Write => report.writes += 1,
        Operation::Read => report.reads += 1,
        // A device that can be opened may still fail every write: this says nothing of I/O.
        Operation::Open => return,
    }
    let pause = (now - report.last_success_us).saturating_sub(waited);
    if pause > report.longest_pause_us {
        (report.longest_pause_us, report.longest_pause_at_us) = (pause, now);
    }
    report.last_success_us = now;
    if !report.working {
        report.working = true;
        // One that is not kept needs no end.
        if let Some(outage) = report.outages.last_mut().filter(|outage| outage.ended_us.is_none()) {
            outage.ended_us = Some(now);
        }
    }
}

fn failed(report: &mut Report, failure: Failure) {
    report.error_count += 1;
    if report.working {
        report.working = false;
        report.outage_count += 1;
        keep(&mut report.outages, Outage { began_us: failure.at_us, ended_us: None, errors: 0 });
    }
    if let Some(outage) = report.outages.last_mut().filter(|outage| outage.ended_us.is_none()) {
        outage.errors += 1;
    }
    keep(&mut report.errors, failure);
}

fn keep<T>(list: &mut Vec<T>, one: T) {
    if list.len() < KEPT {
        list.push(one);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
