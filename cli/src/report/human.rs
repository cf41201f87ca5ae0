// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages for people: lines with the time, and bars where a terminal is.

use super::counts_steps;
use crate::stdout;
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tranship_convert::{Event, Severity};

/// Time after which progress is told again where there is no terminal.
const TELL: Duration = Duration::from_secs(10);

/// The stream that lines are printed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lines {
    /// Where virt-v2v has them.
    Stdout,
    /// Where messages belong.
    Stderr,
    /// Both streams carry something else.
    Nowhere,
}

type Task = (&'static str, Option<usize>);

/// Prints events.
#[derive(Debug)]
pub(super) struct Human {
    program: &'static str,
    lines: Lines,
    begun: Instant,
    quiet: bool,
    colours: bool,
    /// Progress is `N/100` lines on standard output, for programs that read virt-v2v's.
    fractions: bool,
    bars: Option<MultiProgress>,
    tasks: Mutex<HashMap<Task, Shown>>,
}

/// How one task was last shown.
#[derive(Debug)]
struct Shown {
    bar: Option<ProgressBar>,
    told: Instant,
    percent: u64,
}

impl Human {
    pub(super) fn new(program: &'static str, lines: Lines) -> Self {
        let terminal = std::io::stderr().is_terminal() && lines != Lines::Nowhere;
        let unset = |name: &str| std::env::var_os(name).is_none_or(|value| value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let bars = || MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let lines_on_terminal = match lines {
            Lines::Stdout => std::io::stdout().is_terminal(),
            _ => terminal,
        };
        Self {
            program,
            lines,
            begun: Instant::now(),
            quiet: false,
            colours: lines_on_terminal && unset("NO_COLOR") && !dumb,
            fractions: false,
            bars: (terminal && !dumb).then(bars),
            tasks: Mutex::default(),
        }
    }

    pub(super) fn quiet(mut self, quiet: bool) -> Self {
        self.quiet = quiet;
        self
    }

    pub(super) fn colours(mut self, always: bool) -> Self {
        self.colours |= always;
        self
    }

    pub(super) fn fractions(mut self, fractions: bool) -> Self {
        self.fractions = fractions;
        self
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<Task, Shown>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn report(&self, event: &Event) {
        if let Some((done, total)) = event.progress.filter(|_| !counts_steps(event)) {
            if !self.quiet {
                self.progress(event, done, total);
            }
            return;
        }
        if let Some(line) = self.line(event) {
            self.print(&line);
        }
    }

    /// The line for an event that is not progress, if it is to be printed.
    fn line(&self, event: &Event) -> Option<String> {
        let text = &event.message;
        let program = self.program;
        match event.severity {
            Severity::Message if !self.quiet => {
                Some(format!("[{:6.1}] {text}", self.begun.elapsed().as_secs_f64()))
            }
            Severity::Info if !self.quiet => Some(format!("{program}: {text}")),
            Severity::Warning if self.colours => {
                Some(format!("{program}: \x1b[33mwarning\x1b[0m: {text}"))
            }
            Severity::Warning => Some(format!("{program}: warning: {text}")),
            // Errors end the work; they are printed with causes and hints at the end.
            Severity::Message | Severity::Info | Severity::Error => None,
        }
    }

    fn print(&self, line: &str) {
        let print = || match self.lines {
            Lines::Stdout => {
                // A reader who has gone misses messages; the work goes on.
                let _ = stdout::print(&format!("{line}\n"));
            }
            Lines::Stderr => stdout::complain(line),
            Lines::Nowhere => {}
        };
        match &self.bars {
            Some(bars) => bars.suspend(print),
            None => print(),
        }
    }

    fn progress(&self, event: &Event, done: u64, total: u64) {
        let percent = percent(done, total);
        let now = Instant::now();
        let mut tasks = self.tasks();
        let mut is_new = false;
        let task = tasks.entry((event.name, event.disk)).or_insert_with(|| {
            is_new = true;
            let bar = self.bars.as_ref().map(|bars| bars.add(bar(total)));
            Shown { bar, told: now, percent: 0 }
        });
        if self.fractions {
            if is_new || percent > task.percent {
                task.percent = percent;
                let _ = stdout::print(&format!("{percent}/100\n"));
            }
            return;
        }
        if let Some(bar) = &task.bar {
            bar.set_length(total);
            bar.set_message(event.message.clone());
            if done >= total {
                bar.finish();
            } else {
                bar.set_position(done);
            }
            return;
        }
        let news = percent / 10 > task.percent / 10
            || (percent > task.percent && now.duration_since(task.told) >= TELL);
        if news {
            (task.percent, task.told) = (percent, now);
            drop(tasks);
            let (done, total) = (HumanBytes(done), HumanBytes(total));
            let elapsed = self.begun.elapsed().as_secs_f64();
            self.print(&format!(
                "[{elapsed:6.1}] {}: {percent} % ({done} of {total})",
                event.message
            ));
        }
    }

    /// Leaves the terminal in order.
    pub(super) fn finish(&self) {
        for (_, task) in self.tasks().drain() {
            if let Some(bar) = task.bar {
                if bar.is_finished() { drop(bar) } else { bar.abandon() }
            }
        }
    }
}

fn percent(done: u64, total: u64) -> u64 {
    let scaled = u128::from(done).saturating_mul(100).checked_div(u128::from(total));
    scaled.map_or(100, |percent| u64::try_from(percent).unwrap_or(100).min(100))
}

fn bar(total: u64) -> ProgressBar {
    let template = "{msg} [{bar:30}] {percent:>3} % {binary_bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::new(total).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(human: Human, event: &Event) -> Option<String> {
        Human { colours: false, ..human }.line(event)
    }

    #[test]
    fn lines_look_like_those_of_virt_v2v() {
        let human = || Human::new("virt-v2v", Lines::Nowhere);
        let step = Event::step("x", "Opening the source");
        assert_eq!(line(human(), &step).as_deref(), Some("[   0.0] Opening the source"));
        let warning = Event::warning("x", "odd");
        assert_eq!(line(human(), &warning).as_deref(), Some("virt-v2v: warning: odd"));
        assert_eq!(line(human(), &Event::info("x", "fine")).as_deref(), Some("virt-v2v: fine"));
        assert_eq!(line(human().quiet(true), &step), None);
        assert!(line(human().quiet(true), &warning).is_some());
        let coloured = human().colours(true).line(&warning).unwrap();
        assert!(coloured.contains("\x1b[33mwarning"), "{coloured}");
    }

    #[test]
    fn percents_stay_in_range() {
        for (done, total, expected) in
            [(0, 0, 100), (0, 9, 0), (5, 10, 50), (u64::MAX, 1, 100), (u64::MAX, u64::MAX, 100)]
        {
            assert_eq!(percent(done, total), expected, "{done}/{total}");
        }
    }
}
