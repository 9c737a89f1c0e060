"""Chat templates: prompts as transformers 5.23 makes them, and errors that name their cause."""

import concurrent.futures
import copy
import datetime

import pytest

from jaxserve.errors import BadRequest, ConfigError
from jaxserve.models.text_files import read_text_files
from jaxserve.server.chat_template import ChatTemplate

# The shapes of three families' templates, in our own words.
CHATML = """\
{%- if messages[0].role != "system" %}
    {{- "<|im_start|>system\\nYou are helpful.<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- continue %}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>" + "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""
LLAMA = """\
{% for message in messages %}
    {% set header = "<|start_header_id|>" ~ message["role"] ~ "<|end_header_id|>\\n\\n" %}
    {% set turn = header ~ message["content"] | trim ~ "<|eot_id|>" %}
    {% if loop.first %}{% set turn = bos_token ~ turn %}{% endif %}
{{- turn -}}
{% endfor %}
{% if add_generation_prompt -%}
    {{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- if message.role == "user" %}
        {{- "[INST] " ~ message.content ~ " [/INST]" }}
    {%- else %}
        {%- generation %}
        {{- " " ~ message.content | trim ~ eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "user", "content": "Hi <&> 你好"},
    {"role": "assistant", "content": " Hello. "},
    {"role": "user", "content": "More?\n"},
]


def render(source, messages, *, tokens=TOKENS, **options):
    return ChatTemplate(source, tokens).render(messages, **options)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            CHATML,
            "<|im_start|>system\nYou are helpful.<|im_end|>\n"
            "<|im_start|>user\nHi <&> 你好<|im_end|>\n"
            "<|im_start|>assistant\n Hello. <|im_end|>\n"
            "<|im_start|>user\nMore?\n<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            LLAMA,
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi <&> 你好<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nMore?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (MISTRAL, "<s>[INST] Hi <&> 你好 [/INST] Hello.</s>[INST] More?\n [/INST]"),
    ],
    ids=["chatml", "llama", "mistral"],
)
def test_prompts_are_those_of_transformers(source, expected):
    assert render(source, CHAT) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, "<|im_start|>user\nHi <&> 你好<|im_end|>\n<|im_start|>assistant\n Hello. "),
        (
            LLAMA,
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.",
        ),
        (MISTRAL, "<s>[INST] Hi <&> 你好 [/INST] Hello."),
    ],
    ids=["chatml", "llama", "mistral"],
)
def test_the_final_message_can_be_continued(source, expected):
    before = copy.deepcopy(CHAT)
    assert render(source, CHAT[:2], **CONTINUE).endswith(expected)
    assert before == CHAT


def test_the_last_text_among_a_final_messages_parts_is_continued():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}, {"type": "image"}]
    chat = [{"role": "assistant", "content": parts}]
    source = "{% for part in messages[0].content %}{{ part.text }}|{% endfor %}"
    assert render(source, chat, **CONTINUE) == "a|b "
    assert parts[1]["text"] == "b "


@pytest.mark.parametrize(
    ("source", "message", "said"),
    [
        ("{{ messages | length }}", {"role": "user", "content": "x"}, "is not in the prompt"),
        ("{{ messages[0].content[:34] }}", {"role": "user", "content": "x y"}, "not in the prompt"),
        (CHATML, {"role": "user"}, "has no text to continue"),
        (CHATML, {"role": "user", "content": [{"type": "image"}]}, "has no text to continue"),
    ],
)
def test_a_final_message_that_cannot_be_continued_is_refused(source, message, said):
    with pytest.raises(BadRequest, match=said):
        render(source, [message], **CONTINUE)


def test_a_prompt_is_opened_or_continued_but_not_both():
    with pytest.raises(BadRequest, match="^continue_final_message: .* add_generation_prompt false"):
        render(CHATML, CHAT, continue_final_message=True)


def test_without_generation_prompt_the_last_turn_is_closed():
    assert render(CHATML, CHAT, add_generation_prompt=False).endswith("More?\n<|im_end|>\n")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('no tools here') }}", "says: no tools here$"),
        ("{{ messages[0].x.y }}", "UndefinedError: 'dict object' has no attribute 'x'"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: "),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
        ("{{ 1 + 'a' }}", "TypeError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{% for i in range(9999999) %}{% endfor %}", "OverflowError: "),
        ("{% include 'other' %}", "TypeError: no loader"),
        ("{{ namespace | tojson }}", "TypeError: .* not JSON serializable"),
        (
            "{% for i in range(99) %}{{ 'x' * 200000 }}{% endfor %}",
            "the prompt has more than 16777216 characters",
        ),
    ],
)
def test_whatever_a_template_raises_is_a_bad_request(source, said):
    with pytest.raises(BadRequest, match=said) as caught:
        render(source, CHAT)
    assert str(caught.value).startswith("messages: got 'user, assistant, user'; allowed: ")
    assert caught.value.field == "messages" and len(str(caught.value)) < 500


def test_roles_out_of_order_are_refused_in_the_templates_words():
    with pytest.raises(BadRequest, match="got 'user, user'; .* Roles must alternate"):
        render(MISTRAL, [CHAT[0], CHAT[2]])
    with pytest.raises(BadRequest, match="messages: .* at least one message"):
        render(MISTRAL, [])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "chat template: line 2: Expected an expression"),
        ("a\n\n{{ x | pretty }}", "chat template: line 3: No filter named 'pretty'"),
        ("{% generation %}", "chat template: line 1: Unexpected end of template"),
        ("{% break %}", "chat template: cannot be compiled: 'break' outside loop"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "cannot be compiled: maximum recursion"),
    ],
)
def test_a_template_that_is_no_jinja_is_refused(source, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ChatTemplate(source, {})
    assert "\n" not in str(caught.value)


def test_variables_reach_the_template_and_overwrite_nothing():
    source = (
        "{{ bos_token }}{% if enable_thinking is defined and enable_thinking %}think{% endif %}"
    )
    assert render(source, CHAT) == "<s>"
    assert render(source, CHAT, variables={"enable_thinking": True}) == "<s>think"
    assert render(source, CHAT, variables={"self": 1, "no identifier": 2}) == "<s>"
    for name in ("messages", "tools", "documents", "add_generation_prompt", "bos_token"):
        with pytest.raises(BadRequest, match=rf"^chat_template_kwargs\.{name}: got 'x'"):
            render(source, CHAT, variables={name: "x"})


def test_fields_that_are_none_are_left_out_and_reasoning_has_all_its_names():
    source = "{% for m in messages %}{{ m | tojson(sort_keys=true) }}{% endfor %}"
    chat = [{"role": "assistant", "content": None, "reasoning": "é"}]
    assert render(source, chat) == (
        '{"reasoning": "é", "reasoning_content": "é", "role": "assistant", "thinking": "é"}'
    )


def test_json_is_not_escaped_for_html_and_takes_the_filters_arguments():
    chat = [{"role": "user", "content": "<'é'>"}]
    assert render("{{ messages[0] | tojson }}", chat) == '{"role": "user", "content": "<\'é\'>"}'
    source = "{{ messages[0] | tojson(ensure_ascii=true, separators=(',', ':'), indent=None) }}"
    assert render(source, chat) == '{"role":"user","content":"<\'\\u00e9\'>"}'
    assert render("{{ [1] | tojson(indent=2) }}", chat) == "[\n  1\n]"


def test_names_set_in_a_generation_block_stay_in_it():
    source = "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}"
    assert render(source, CHAT) == "21"


def test_a_template_can_ask_for_the_date():
    years = {str(datetime.datetime.now().year)}
    prompt = render("{{ strftime_now('%Y') }}", CHAT)
    assert prompt in years | {str(datetime.datetime.now().year)}


def test_threads_share_a_template():
    template = ChatTemplate(CHATML, TOKENS)
    chats = [[{"role": "user", "content": str(n)}] for n in range(200)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        prompts = list(pool.map(template.render, chats))
    assert prompts == [render(CHATML, chat) for chat in chats]


# ---------------------------------------------------------------- the demo model's template


def demo_prompt(messages, **options):
    text = read_text_files("demo")
    return render(text.chat_template, messages, tokens=text.special_tokens, **options)


def test_a_chat_with_the_demo_model_is_a_scene():
    chat = [
        {"role": "system", "content": "Night. A garden.\n"},
        {"role": "user", "content": "What news?"},
        {"role": "assistant", "content": "None, my lord. "},
        {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]},
    ]
    assert demo_prompt(chat) == (
        "Night. A garden.\n\n"
        "GLOUCESTER:\nWhat news?\n\n"
        "KING EDWARD IV:\nNone, my lord.\n\n"
        "GLOUCESTER:\nWho are you?\n\n"
        "KING EDWARD IV:\n"
    )


def test_names_make_the_demo_models_speakers():
    chat = [
        {"role": "user", "content": "What news?", "name": "King Edward IV"},
        {"role": "assistant", "content": "None."},
        {"role": "assistant", "content": "But soft!", "name": "Romeo"},
        {"role": "user", "content": "Well?"},
    ]
    assert demo_prompt(chat) == (
        "KING EDWARD IV:\nWhat news?\n\nGLOUCESTER:\nNone.\n\n"
        "ROMEO:\nBut soft!\n\nKING EDWARD IV:\nWell?\n\nROMEO:\n"
    )
    assert demo_prompt(chat[:3], **CONTINUE).endswith("\n\nROMEO:\nBut soft!")


def test_the_demo_model_knows_three_roles():
    with pytest.raises(BadRequest, match='role: got "tool"; allowed: system, user, assistant'):
        demo_prompt([{"role": "tool", "content": "7"}])
