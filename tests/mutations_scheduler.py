"""What is broken on purpose in the scheduler's indexes, shares and quotes, in what it takes back from workers,
and in what turns schemas into grammars."""

from __future__ import annotations

from mutations import of

SILENT = of(
    "silent workers",
    ("what a silent worker has not begun stays with it", "forsaken", "if f.worker in silent and f.waiting]", "if False]"),
    ("what it has begun is taken back too", "forsaken", "in silent and f.waiting", "in silent"),
    ("it is taken back though nobody else is there", "forsaken", "if not silent or not self.roster.workers:", "if not silent:"),
    ("workers that are gone are forgotten with their jobs", "forsaken", "self._doubted.keys() | self._gone", "self._doubted.keys()"),
    ("what was claimed for a worker as it vanished stays", "meet", "self._gone | self._infos.keys()", "self._gone | self._held.keys()"),
    ("a worker that leaves a batch lying is given more", "_doubt", "self.roster.drop(flight.worker)", "pass"),
    ("a worker is doubted for ever", "meet", "if name not in alive or alive[name].seen_ms > since]", "if name not in alive]"),
    ("a worker that was heard of since is doubted", "_doubt", "info.seen_ms < flight.claimed and", ""),
    ("a worker that hears no word has no time to ask", "_doubt", " and flight.worker not in self._heard:", ":"),
    ("a worker that never takes anything is not doubted twice", "_count_beats", "== BEATS:", "== 10 * BEATS:"),
    suite="backlog",
    file="lorayard_scheduler/backlog.py",
)

RECALLED = [
    *of(
        "silent workers",
        ("nobody takes back what is left lying", "_recall", "if batches := self._backlog.forsaken:", "if batches := []:"),
        suite="recalls",
        file="lorayard_scheduler/dispatcher.py",
    ),
    *of(
        "recalls for what is urgent",
        ("for what is in time as it is", "recalls", "<= left for worker in decks):", "<= 0 for worker in decks):"),
        ("while another worker has room", "recalls", "for worker in _first(view, group, policy)):", "for worker in ()):"),
        ("for what is late whatever is done", "_given_up", "if begins <= group.due - now:", "if True:"),
        ("of what is due sooner", "_given_up", "if held.waiting and TICKS * held.due > here)", "if held.waiting)"),
        ("of what would be late itself", "_given_up", " if now + back <= held.due else None", ""),
        ("of what has least time first", "_given_up", "key=lambda held: -held.due", "key=lambda held: held.due"),
        ("of what runs beside it", "_given_up", "jobs=held.jobs - held.waiting", "jobs=0"),
        ("twice for the same news", "recalls", "not (view.groups.news or view.roster.news)", "False"),
        ("where it begins last", "_best", "min(found)", "max(found)"),
        suite="recalls",
        file="lorayard_scheduler/recall.py",
    ),
]

FLOODS = of(
    "who floods alone",
    ("a flood is alone though others wait", "alone", "if len(self.floods) < len(self.tenants):", "if False:"),
    (
        "a flood is alone though others have just been there",
        "alone",
        "if at < since or name not in self.floods:",
        "if True:\n                return True",
    ),
    ("what a flood was before it became one keeps it company", "alone", " or name not in self.floods:", " or True:"),
    ("whoever was there once keeps a flood company", "alone", "return at < since", "return False"),
    suite="planner",
    file="lorayard_scheduler/groups.py",
)

_SHARES = "shares beside a flood"
SHARES = [
    *of(
        _SHARES,
        ("a flood begins with everybody's past", "settle", "if contended and not self._contended:", "if False:"),
        ("who is away is not looked at when a flood begins", "settle", "{*self._served, *active}", "active"),
        ("who has all its jobs at workers is away", "settle", "{*self.tenants, *flying}", "{*self.tenants}"),
        ("a newcomer has a claim on the past", "settle", "if self._active:", "if False:"),
        suite="backlog",
        file="lorayard_scheduler/groups.py",
    ),
    *of(
        _SHARES,
        ("a flood is held back though nobody else is there", "", " and not groups.alone(now - policy.flood_ms)", ""),
        ("a flood leaves no room", "hold_back", "return floods and self.beside and", "return False and"),
        ("a flood goes on everywhere beside jobs of others", "rows", "if not seat.steady or", "if True or"),
        ("a flood's prompts are read as they come", "to_read", "return max(0, ", "return max(seat.prices.rows, "),
        ("what is held back comes all the same", "over", "> self.limit", "> math.inf"),
        ("what a plan gives to whom is forgotten", "had", " + self._charged.get(tenant.name, 0.0)", ""),
        suite="floods",
        file="lorayard_scheduler/floods.py",
    ),
    *of(
        _SHARES,
        (
            "what is held back is nearly due",
            "first",
            "if (tenant := self.tenants[name]).served <= limit:",
            "if tenant := self.tenants[name]:",
        ),
        suite="quotes",
        file="lorayard_scheduler/groups.py",
    ),
    *of(
        _SHARES,
        ("what a flood is served first is not quoted", "_local", "if others else place", "if False else place"),
        ("what its tenant had before is not quoted", "_before_share", "self.served.get(tenant, 0.0) + mine", "mine"),
        ("floods share evenly whatever they had", "_of_floods", "had + queued - theirs", "queued"),
        suite="quotes",
        file="lorayard_scheduler/quotes.py",
    ),
    *of(
        _SHARES,
        ("what is held back counts as due sooner", "_by_due", " and group.tenant.served <= limit:", ":"),
        ("waits for a share are taken for waits for a hand", "dispatched", " and not wait.share:", ":"),
        ("whoever comes waits for what floods", "make", "policy, floods=False)", "policy)"),
        suite="quotes",
        file="lorayard_scheduler/forecasts.py",
    ),
    *of(
        _SHARES,
        ("the simulator looks who is there only while something waits", "turn", "self._settle()", "self.groups.jobs and self._settle()"),
        suite="simulator",
        file="lorayard_scheduler/simulated.py",
    ),
]

_APART = "hosted work counted apart"
APART = [
    *of(_APART, ("what hosted workers compute counts at home", "finish", "'^[^/]+') .. sorts[same][4]", "'^[^/]+')")),
    *of(
        _APART,
        (
            "what hosted workers have counts at home",
            "_fly",
            "lane_of(flight.digest) not in _LOCAL or flight.worker in self._hosted",
            "False",
        ),
        ("an auto job at a hosted worker counts at home", "_fly", " or flight.worker in self._hosted", ""),
        ("who begins to wait there is lifted here", "lift_there", ", hosted=True)", ")"),
        suite="backlog",
        file="lorayard_scheduler/backlog.py",
    ),
    *of(
        _APART,
        ("who begins to wait there has a claim on the past", "settle", "served.get(tenant, 0.0) < self._level}", "False}"),
        ("who was away has waited all the time", "settle", "self._waiting = frozenset(waiting)", "self._waiting |= frozenset(waiting)"),
        suite="plans",
        file="lorayard_scheduler/hosted_planner.py",
    ),
]

SCHEMAS = of(
    "schemas",
    ("a keyword that is not known is left out", "_visit", "if name not in _KNOWN and", "if False and"),
    ("items need not be unique where they should", "_visit", 'name == "uniqueItems" and value is False', 'name == "uniqueItems"'),
    ("schemas may be as deep as they like", "_visit", "if self._depth > _DEEPEST:", "if False:"),
    ("keywords beside a reference are left out", "_whole", "if len(given) > 1:", "if False:"),
    ("a schema may be made of itself alone", "_reference", "if pointer in through:", "if False:"),
    ("what is required may be left out", "_object", "if name in needed:", "if False:"),
    ("what is not required must be there", "_object", "if name in needed:", "if True:"),
    ("what is required need be no property", "_object", " and name in properties for name in required", " for name in required"),
    ("a fixed list may be longer", "_array", "if not low <= len(prefix) <= (len(prefix) if high is None else high):", "if False:"),
    ("an empty list has an item", "_array", "if high == 0:", "if False:"),
    ("a list has one item too many", "_array", "high - 1, where", "high, where"),
    ("lengths are not kept to", "_times", "return f\"{{{low},{'' if high is None else high}}}\"", 'return "*"'),
    ("all repetitions together are not counted", "_times", "if self._repeats > _MOST_TOGETHER:", "if False:"),
    ("a length has no limit", "_span", "if value is not None and value > MOST_REPEATS:", "if False:"),
    ("a grammar may be of any size", "convert", "if len(grammar) > MOST_BYTES:", "if False:"),
    ("values of another type stay in an enum", "_values", "if any(_is(value, kind) for kind in kinds)", "if kinds"),
    ("true is a number", "_is", " and not isinstance(value, bool)", ""),
    ("a bound that is excluded is let through", "_integer", "-limit - 1)) + 1)", "-limit - 1)))"),
    (
        "a bound between whole numbers lets the next through",
        "_integer",
        'math.floor(bounds.get("maximum", limit))',
        'math.ceil(bounds.get("maximum", limit))',
    ),
    ("decimals reach over a bound that is excluded", "_decimals", "if not below and low", "if low"),
    ("no decimals come behind a bound that is excluded", "_decimals", "if above and low < high:", "if False:"),
    ("numbers from low on end at nines", "_of_length", 'if high[1:].strip("9"):', "if False:"),
    ("numbers to high begin at noughts", "_of_length", 'if low[1:].strip("0"):', "if False:"),
    suite="schemas",
    file="lorayard/schemas.py",
)

PATTERNS = of(
    "schemas",
    ("what may be empty is repeated", "_quantified", "if node.empty and high not in (0, 1):", "if False:"),
    (
        "repetitions within each other fit in too many ways",
        "_quantified",
        "if node.ways > 1 and node.ways * times >= _MOST_WAYS:",
        "if False:",
    ),
    ("repetitions of repetitions are not counted", "_quantified", "if size > MOST_REPEATS:", "if False:"),
    ("a count may go downwards", "_times", "if 0 <= high < low:", "if False:"),
    ("a dot fits line ends", "_atom", "_complement(_LINE_ENDS)", "[(0, _LAST)]"),
    ("what a class leaves out is let in", "_class", "return _complement(ranges) if negated else ranges", "return ranges"),
    ("a range of nothing is taken", "_class", " or low > high:", ":"),
    ("groups may be as deep as they like", "_group", "if self._depth > _DEEPEST:", "if False:"),
    suite="schemas",
    file="lorayard/patterns.py",
)

AT_SUBMIT = of(
    "schemas",
    ("a schema at fault is found by the worker only", "", "        schema_grammar(wanted.json_schema.schema)", "        pass"),
    suite="schemas",
    file="lorayard/bodies.py",
)

SCHEDULER_MUTANTS = [*SILENT, *RECALLED, *FLOODS, *SHARES, *APART, *SCHEMAS, *PATTERNS, *AT_SUBMIT]
