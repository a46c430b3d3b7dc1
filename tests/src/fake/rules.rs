//! The rules by which the fake misbehaves: their text, and which of them hold for a call, an event or the guest. The language is described
//! in [`crate::fake`]; acting on a rule is for others.

use serde_json::Value;

/// What a rule is about: calls of a command or events of a name, all of them or one.
#[derive(Clone, Debug, Default)]
struct Subject {
    name: String,
    id: Option<String>,
    nth: Option<u32>,
    seen: u32,
}

impl Subject {
    fn parse(text: &str) -> Result<Subject, String> {
        let (text, nth) = match text.split_once('#') {
            Some((text, nth)) => (text, Some(number(nth)?)),
            None => (text, None),
        };
        let (name, id) = match text.split_once('@') {
            Some((name, id)) => (name, Some(id.to_owned())),
            None => (text, None),
        };
        Ok(Subject { name: name.to_owned(), id, nth, seen: 0 })
    }

    /// Whether this is the one; counts.
    fn hit(&mut self, name: &str, id: &str) -> bool {
        if self.name != name && self.name != "*" || self.id.as_ref().is_some_and(|wanted| wanted != id) {
            return false;
        }
        self.seen += 1;
        self.nth.is_none_or(|nth| nth == self.seen)
    }
}

/// When a process dies, as seen from the command that kills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Before,
    Executed,
    After,
}

/// How a process dies: an exit status, or SIGKILL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Death {
    Exit(i32),
    Kill,
}

/// What happens to a command.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Twist {
    Fail { class: String, desc: String },
    Late(u64),
    Hang,
    Mute,
    Tear(u64),
    Die(Death, Moment),
    Event { name: String, data: Value, before: bool },
    Eject(String),
}

/// What happens to an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    Lose,
    Twice,
    Late(u64),
}

/// How the guest answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    Remove,
    Early,
    Late(u64),
    Refuse,
    Ignore,
    IgnoreFirst(u32),
    RefuseRepeats,
    IgnorePowerdown,
}

/// What happens at the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Start {
    Die { status: i32, message: String },
    Mute,
}

#[derive(Clone, Debug)]
enum Rule {
    Start(Start),
    Guest(Option<String>, Guest),
    Event(Subject, Delivery),
    Command(Subject, Twist),
}

/// All rules, in the order given.
#[derive(Debug, Default)]
pub(super) struct Rules(Vec<Rule>);

impl Rules {
    /// Adds the rules of a text; `probing` says for which of the two kinds of run. Errors name the rule.
    pub(super) fn add(&mut self, text: &str, probing: bool) -> Result<(), String> {
        let mut added = Vec::new();
        for rule in text.split([';', '\n']).map(str::trim).filter(|rule| !rule.is_empty()) {
            let (probe, body) = rule.strip_prefix("probe ").map_or((false, rule), |body| (true, body));
            let parsed = parse(body).map_err(|why| format!("rule {rule:?}: {why}"))?;
            if probe == probing {
                added.push(parsed);
            }
        }
        self.0.extend(added);
        Ok(())
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn start(&self) -> Option<&Start> {
        self.0.iter().find_map(|rule| if let Rule::Start(start) = rule { Some(start) } else { None })
    }

    /// The twists for this call. Counts it.
    pub(super) fn command(&mut self, name: &str, id: &str) -> Vec<Twist> {
        let hits = self.0.iter_mut().filter_map(|rule| match rule {
            Rule::Command(subject, twist) => subject.hit(name, id).then(|| twist.clone()),
            _ => None,
        });
        hits.collect()
    }

    /// The delivery of this event. Counts it.
    pub(super) fn event(&mut self, name: &str, id: &str) -> Option<Delivery> {
        let hits = self.0.iter_mut().filter_map(|rule| match rule {
            Rule::Event(subject, delivery) => subject.hit(name, id).then_some(*delivery),
            _ => None,
        });
        hits.last()
    }

    /// How the guest answers an unplug of device `id`: the last rule that holds for it.
    pub(super) fn unplug(&mut self, id: &str) -> Guest {
        let about = |guest: &Guest| !matches!(guest, Guest::RefuseRepeats | Guest::IgnorePowerdown);
        let rule = self.guest(id).filter(|guest| about(guest)).last();
        match rule {
            Some(Guest::IgnoreFirst(0)) | None => Guest::Remove,
            Some(Guest::IgnoreFirst(left)) => {
                *left -= 1;
                Guest::Ignore
            }
            Some(guest) => guest.clone(),
        }
    }

    pub(super) fn refuses_repeats(&mut self, id: &str) -> bool {
        self.guest(id).any(|guest| *guest == Guest::RefuseRepeats)
    }

    pub(super) fn ignores_powerdown(&mut self) -> bool {
        self.guest("").any(|guest| *guest == Guest::IgnorePowerdown)
    }

    fn guest<'a>(&'a mut self, id: &'a str) -> impl Iterator<Item = &'a mut Guest> + 'a {
        self.0.iter_mut().filter_map(move |rule| match rule {
            Rule::Guest(wanted, guest) if wanted.as_ref().is_none_or(|wanted| wanted == id) => Some(guest),
            _ => None,
        })
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.trim().parse().map_err(|_| format!("{text:?} is not a number"))
}

fn word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once(char::is_whitespace).map_or((text, ""), |(word, rest)| (word, rest.trim_start()))
}

fn parse(rule: &str) -> Result<Rule, String> {
    let (subject, action) = rule.split_once(": ").ok_or("it has no `: ` between subject and action")?;
    let (verb, rest) = word(action);
    if subject == "start" {
        return Ok(Rule::Start(match verb {
            "die" => {
                let (status, message) = word(rest);
                Start::Die { status: number(status)?, message: message.to_owned() }
            }
            "mute" => Start::Mute,
            _ => return Err("a start can `die STATUS MESSAGE` or be `mute`".to_owned()),
        }));
    }
    if let Some(id) = subject.strip_prefix("guest").filter(|rest| rest.is_empty() || rest.starts_with('@')) {
        return Ok(Rule::Guest(id.strip_prefix('@').map(str::to_owned), guest(verb, rest)?));
    }
    if let Some(name) = subject.strip_prefix("event ") {
        let delivery = match verb {
            "lose" => Delivery::Lose,
            "twice" => Delivery::Twice,
            "late" => Delivery::Late(number(rest)?),
            _ => return Err("an event can be `lose`, `twice` or `late MS`".to_owned()),
        };
        return Ok(Rule::Event(Subject::parse(name)?, delivery));
    }
    Ok(Rule::Command(Subject::parse(subject)?, twist(verb, rest)?))
}

fn guest(verb: &str, rest: &str) -> Result<Guest, String> {
    Ok(match (verb, word(rest)) {
        ("unplug", ("remove", _)) => Guest::Remove,
        ("unplug", ("early", _)) => Guest::Early,
        ("unplug", ("late", ms)) => Guest::Late(number(ms)?),
        ("unplug", ("refuse", _)) => Guest::Refuse,
        ("unplug", ("ignore", "")) => Guest::Ignore,
        ("unplug", ("ignore", times)) => Guest::IgnoreFirst(number(times)?),
        ("repeat", ("refuse", _)) => Guest::RefuseRepeats,
        ("powerdown", ("ignore", _)) => Guest::IgnorePowerdown,
        _ => {
            return Err(
                "a guest can `unplug remove|early|late MS|refuse|ignore [TIMES]`, `repeat refuse` or \
                        `powerdown ignore`"
                    .to_owned(),
            );
        }
    })
}

fn moment(text: &str) -> Result<Moment, String> {
    match text.trim() {
        "before" => Ok(Moment::Before),
        "executed" => Ok(Moment::Executed),
        "after" => Ok(Moment::After),
        other => Err(format!("{other:?} is none of before, executed, after")),
    }
}

fn twist(verb: &str, rest: &str) -> Result<Twist, String> {
    let (first, second) = word(rest);
    let event = |before| {
        let data = if second.is_empty() { Ok(Value::Null) } else { serde_json::from_str(second) };
        let data = data.map_err(|error| error.to_string())?;
        Ok::<Twist, String>(Twist::Event { name: first.to_owned(), data, before })
    };
    Ok(match verb {
        "fail" => Twist::Fail { class: first.to_owned(), desc: second.to_owned() },
        "late" => Twist::Late(number(first)?),
        "hang" => Twist::Hang,
        "mute" => Twist::Mute,
        "tear" => Twist::Tear(number(first)?),
        "exit" => Twist::Die(Death::Exit(number(first)?), moment(second)?),
        "kill" => Twist::Die(Death::Kill, moment(first)?),
        "event-before" => event(true)?,
        "event-after" => event(false)?,
        "eject" => Twist::Eject(first.to_owned()),
        other => return Err(format!("a command cannot {other:?}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Rules {
        let mut rules = Rules::default();
        rules.add(text, false).expect("rules");
        rules
    }

    #[test]
    fn a_rule_holds_for_its_call_only() {
        let mut rules = rules("blockdev-add@x#2: fail GenericError No space left; *#1: mute");
        assert_eq!(rules.command("blockdev-add", "x"), [Twist::Mute]);
        assert_eq!(rules.command("blockdev-add", "y"), []);
        let fail = Twist::Fail { class: "GenericError".to_owned(), desc: "No space left".to_owned() };
        assert_eq!(rules.command("blockdev-add", "x"), [fail]);
        assert_eq!(rules.command("blockdev-add", "x"), []);
    }

    #[test]
    fn the_guest_ignores_as_often_as_it_is_told_and_the_last_rule_wins() {
        let mut rules = rules("guest: unplug refuse\nguest@d: unplug ignore 1\nguest@d: repeat refuse");
        assert_eq!(rules.unplug("other"), Guest::Refuse);
        assert_eq!((rules.unplug("d"), rules.unplug("d")), (Guest::Ignore, Guest::Remove));
        assert_eq!((rules.refuses_repeats("d"), rules.refuses_repeats("other")), (true, false));
    }

    #[test]
    fn the_probe_and_the_launch_have_rules_of_their_own() {
        let text = "probe start: die 3 no such luck; event STOP#2: twice";
        let (mut launch, mut probe) = (rules(text), Rules::default());
        probe.add(text, true).expect("rules");
        assert_eq!(launch.start(), None);
        assert_eq!(probe.start(), Some(&Start::Die { status: 3, message: "no such luck".to_owned() }));
        assert_eq!((launch.event("STOP", ""), launch.event("STOP", "")), (None, Some(Delivery::Twice)));
    }

    #[test]
    fn a_wrong_rule_is_named() {
        for wrong in ["quit", "quit: dance", "guest: unplug maybe", "quit#x: mute", "quit: exit 1 soon"] {
            let error = Rules::default().add(wrong, false).expect_err(wrong);
            assert!(error.starts_with(&format!("rule {wrong:?}: ")), "{error}");
        }
    }
}
