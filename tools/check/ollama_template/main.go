// Renders Go templates as Ollama does, old versions and new ones: a JSON list of jobs in, a JSON list of texts out.
//
// Written from Ollama's documentation of its templates (docs/template.md, docs/modelfile.md) and from what its
// versions do: "new" is since July 2024, "old" before. See nsds_gguf/modelfile.py for the facts.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type Job struct {
	Template string    `json:"template"`
	Version  string    `json:"version"`
	Messages []Message `json:"messages"`
}

type Turn struct{ System, Prompt, Response string }

func main() {
	var jobs []Job
	check(json.NewDecoder(os.Stdin).Decode(&jobs))
	texts := make([]string, len(jobs))
	for i, job := range jobs {
		text, err := render(job)
		if err != nil {
			check(fmt.Errorf("job %d: %w", i, err))
		}
		texts[i] = text
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func render(job Job) (string, error) {
	parsed, err := template.New("").Option("missingkey=zero").Parse(job.Template)
	if err != nil {
		return "", err
	}
	if job.Version == "new" && mentions(parsed.Root, "Messages") {
		system := ""
		for _, message := range job.Messages {
			if message.Role == "system" {
				system = message.Content
			}
		}
		return execute(parsed, map[string]any{"System": system, "Messages": job.Messages, "Response": ""})
	}
	var text strings.Builder
	turns := turnsOf(job.Messages)
	for i, turn := range turns {
		if i == len(turns)-1 { // to be continued by the model
			cut(parsed, job.Version)
		}
		values := map[string]any{"System": turn.System, "Prompt": turn.Prompt, "Response": turn.Response}
		part, err := execute(parsed, values)
		if err != nil {
			return "", err
		}
		text.WriteString(part)
	}
	return text.String(), nil
}

func execute(parsed *template.Template, values map[string]any) (string, error) {
	var text strings.Builder
	err := parsed.Execute(&text, values)
	return text.String(), err
}

// turnsOf groups messages into turns: a prompt, its answer, and the system prompt that came before them.
func turnsOf(messages []Message) []Turn {
	var turns []Turn
	var turn Turn
	for _, message := range messages {
		switch message.Role {
		case "system":
			turn.System = message.Content
		case "user":
			turn.Prompt = message.Content
		case "assistant":
			turn.Response = message.Content
			turns = append(turns, turn)
			turn = Turn{}
		}
	}
	return append(turns, turn)
}

// cut drops what follows .Response, and in old versions adds it where it is not found outside of conditions.
func cut(parsed *template.Template, version string) {
	root := parsed.Root
	for i, node := range root.Nodes {
		_, isAction := node.(*parse.ActionNode)
		if mentions(node, "Response") && (isAction || version == "new" && !onlyAsks(node)) {
			root.Nodes = root.Nodes[:i+1]
			return
		}
	}
	panic("a template without .Response outside of conditions is applied differently by different versions")
}

// onlyAsks tells whether a node is a condition on .Response that does not write it.
func onlyAsks(node parse.Node) bool {
	branch, isIf := node.(*parse.IfNode)
	if !isIf {
		return false
	}
	return !mentions(branch.List, "Response") && (branch.ElseList == nil || !mentions(branch.ElseList, "Response"))
}

func mentions(node parse.Node, field string) bool {
	return strings.Contains(node.String(), "."+field)
}
