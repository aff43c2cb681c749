//! Templates of our own, for what published ones touch rarely.

/// Names and sources.
pub(super) const EDGES: &[(&str, &str)] = &[
    (
        "tojson",
        "{{ messages|tojson }}\n{{ messages|tojson(indent=2) }}\n{{ messages|tojson(indent=0) }}\
         {{ messages|tojson(ensure_ascii=true) }}{{ messages|tojson(sort_keys=true, separators=(',', ':')) }}\
         {{ messages|tojson(indent='\\t') }}{{ messages|tojson(false, 4) }}{{ messages[:1]|tojson }}",
    ),
    (
        "tojson_literals",
        "{{ {'b': [1, 2.0, 1e20, 1.5e-7, -0.0, true, none], 'a': {}, 'c': [], 7: 'x', true: 0.1, none: '<&>\\''}|tojson }}\
         {{ {'z': {'y': [{'x': [[]]}]}, 'a': 'é\\n\\t\"\\\\/'}|tojson(indent=1) }}{{ 'text'|tojson }}{{ 3|tojson }}\
         {{ none|tojson }}{{ ()|tojson }}{{ (1, 'b')|tojson }}{{ 12345678901234567890|tojson }}\
         {{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }}{{ {'q': \"it's\"}|tojson|length }}",
    ),
    ("tojson_undefined", "{{ nowhere|tojson }}"),
    (
        "tools",
        "{%- if tools is not none and tools is defined %}tools{% endif %}{{ tools is none }}{{ documents is none }}\
         {%- set tool = {'type': 'function', 'function': {'name': 'f', 'parameters': {'type': 'object', 'properties': \
         {'items': {'type': 'array', 'items': {'type': 'string'}}, 'n': {'type': ['integer', 'null'], 'default': 1.0}}, \
         'required': ['items']}}} %}\
         {%- for k, v in tool.function.parameters.properties.items() %}{{ k }}={{ v['type'] }}{{ v.default is defined }};{% endfor %}\
         {{ tool | tojson(indent=4) }}{{ tool.function.parameters.keys()|list }}{{ tool.get('function').get('x', 'none') }}\
         {%- for k, v in tool.function|dictsort %}{{ k }},{% endfor %}{{ tool['function']['parameters']['required']|join(', ') }}",
    ),
    (
        "strftime",
        "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d') }}|{{ strftime_now('%A, %B %-d, %y %j %U %W %w %u %V %G') }}\
         |{{ strftime_now('%H:%M:%S %I %p %f %c %x %X %D %F %T %R %r %e %C %h %% %Z%z') }}{{ strftime_now('') }}",
    ),
    (
        "white_space",
        "  {% for m in messages %}  \n    {%- if true %}\n  a {{ m.role }}  \n\n   {% endif -%}   \n\t{# c #}\n  {#- d -#}  \n\
         {%+ if true %} kept{% endif +%}\n{{- ' x ' -}}\n   {% endfor %}\n\n\nend\n\n",
    ),
    ("newlines", "a\r\n{% if true %}\r\n  b\rc\n{% endif %}\r\nd\r\n"),
    ("one_trailing_newline", "{{ messages|length }}\n"),
    (
        "generation",
        "{% set x = 'out' %}{% for m in messages %}\n{% generation %}\n  {% set x = 'in' %}{{ x }}{{ loop.index }}{{ m.content }}\n\
         {%- endgeneration -%}\n {{ x }}{% endfor %}{%- generation -%} a {%- endgeneration -%} b {{ '{% generation %}' }}\
         {# {% generation %} #}{% raw %}{% generation %}{% endraw %}",
    ),
    (
        "loop_controls",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}{{ loop.last }}{{ loop.previtem.role }}\
         {{ loop.nextitem.role if not loop.last }}{{ loop.cycle('a', 'b') }}{{ loop.length }}{{ loop.revindex0 }}\
         {% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}{% for x in [] %}{% else %}empty{% endfor %}",
    ),
    (
        "namespace_and_macros",
        "{% set ns = namespace(n=0, last='', found=false) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}\
         {% set ns.last = m.role %}{% if m.role == 'tool' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.n }}{{ ns.last }}{{ ns.found }}\
         {% macro f(a, b='d', c=none) %}({{ a }}{{ b }}{{ c }}{{ caller() if caller is defined }}){% endmacro %}\
         {{ f(1) }}{{ f('x', c=2) }}{% call f(3) %}body{% endcall %}{% set block %}\n  set {{ f(4) }}\n{% endset %}{{ block|trim }}",
    ),
    (
        "strings",
        "{% for m in messages %}{% set c = m.content %}[{{ c.strip() }}|{{ c.lstrip() }}|{{ c.rstrip('\\n ') }}|{{ c.split()|join('~') }}|{{ c.split('\\n')|join('~') }}|\
         {{ c.split(' ', 1)|join('~') }}|{{ c.split(maxsplit=1)|join('~') }}|{{ c.rsplit(' ', 1)|join('~') }}|{{ c.rsplit(None, 1)|join('~') }}|{{ c.splitlines()|join('~') }}|{{ c.splitlines(true)|join('~') }}|\
         {{ c.partition('</think>')[2] }}|{{ c.rpartition(' ')[0] }}|{{ c.removeprefix('1').removesuffix('a') }}|{{ c.upper() }}|{{ c.title() }}|\
         {{ c.replace('a', 'b') }}|{{ c.replace('', '-', 2) }}|{{ c.startswith('<') }}|{{ c.endswith(('a', '3')) }}|{{ c.find('i') }}|\
         {{ c|trim }}|{{ c|upper }}|{{ c|capitalize }}|{{ c|length }}|{{ c[::-1] if c }}|{{ c[:3] }}|{{ c[-2:] }}|{{ 'x' in c }}|{{ c.count('a') }}]{% endfor %}",
    ),
    (
        "values",
        "{{ none }}{{ true }}{{ false }}{{ 1.0 }}{{ 1e20 }}{{ 1e-7 }}{{ 7 // 2 }}{{ 7 / 2 }}{{ -7 % 3 }}{{ 2 ** 10 }}{{ 'a' ~ 1 ~ none ~ true }}\
         {{ [1, 'a', none, true, 1.5] }}{{ {'a': [1], 'b': 'it\\'s'} }}{{ ('a',) }}{{ [1] + [2] }}{{ 'ab' * 2 }}{{ 1 if false }}\
         {{ [3, 1, 2]|sort }}{{ [1, 2]|last }}{{ 'abc'|first }}{{ 'abc'|list }}{{ 5|string + 'x' }}{{ '7'|int + 1 }}{{ range(3)|list }}\
         {{ [1, 2, 3]|map('string')|join('-') }}{{ messages|map(attribute='role')|join(',') }}\
         {{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ messages|rejectattr('role', 'in', ['user'])|list|length }}\
         {{ ['a', 'b']|reject('equalto', 'a')|list }}{{ 'x'|default('d') }}{{ nowhere|default('d') }}{{ ''|default('d', true) }}{{ 3.7|int }}{{ 3.14159|round(2) }}",
    ),
    (
        "tests",
        "{% for v in ['s', 1, 1.5, true, none, [1], (1,), {'a': 1}] %}{{ v is string }}{{ v is number }}{{ v is integer }}{{ v is float }}{{ v is boolean }}\
         {{ v is none }}{{ v is mapping }}{{ v is iterable }}{{ v is sequence }}{{ v is defined }}{{ v is true }};{% endfor %}\
         {{ nowhere is defined }}{{ nowhere is undefined }}{{ nowhere is string }}{{ nowhere is iterable }}{{ nowhere is none }}{{ messages is sequence }}\
         {{ 3 is odd }}{{ 4 is even }}{{ 4 is divisibleby 2 }}{{ 'a' is in 'abc' }}{{ 1 == 1.0 }}{{ not nowhere }}{{ 'a' < 'b' }}{{ 1 is eq 1 }}{{ messages[1:] is sequence }}",
    ),
    (
        "undefined",
        "[{{ nowhere }}][{{ messages[0].nothing }}][{% for x in nowhere %}{{ x }}{% endfor %}][{{ nowhere == '' }}][{{ nowhere|length }}]\
         [{{ messages[99] }}][{{ nowhere ~ 'a' }}][{{ nowhere or 'b' }}][{% if nowhere %}c{% else %}d{% endif %}][{{ additional_special_tokens is defined }}]",
    ),
    ("undefined_attribute", "{{ nowhere.attribute }}"),
    ("undefined_plus", "{{ 'a' + nowhere }}"),
    ("undefined_call", "{{ nowhere() }}"),
    ("undefined_method", "{{ messages[0].content.nothing() }}"),
    ("string_plus_number", "{{ 'a' + 1 }}"),
    ("syntax", "{% for m in messages %}{{ m.role }}"),
    ("unknown_filter", "{{ messages|nothing }}"),
    (
        "raise",
        "{{ raise_exception('Conversation of ' ~ messages|length ~ ' messages: \"no\" é') }}",
    ),
    (
        "raise_in_macro",
        "{% macro f(x) %}{{ raise_exception(x) }}{% endmacro %}{% for m in messages %}{{ f('no ' + m.role) }}{% endfor %}",
    ),
    (
        "special",
        "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token is defined }}{{ bos_token + 'x' }}",
    ),
    (
        "slices",
        "{% set rest = messages[1:] %}{{ rest|length }}{% for m in rest %}{{ m.role }}{% endfor %}{{ rest[0].role if rest }}{{ messages[::-1][0].role if messages }}\
       {{ (messages|last).role if messages }}{{ messages[-1]['role'] if messages }}{{ rest == [] }}{% if not rest %}none{% endif %}{{ rest is iterable }}",
    ),
    (
        "escapes",
        "{{ '\\n\\t\\\\ \\'\\\" \\u00e9 \\x41' }}{{ \"a'b\" }}{{ '<b>&'|safe }}{{ '<b>&' }}{{ 'a\nb' }}",
    ),
];
